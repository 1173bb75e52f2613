// pared._core: the list of what is bound. Each register_*.cc binds one family of operations.
#include "bindings/register.h"
#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace py = pybind11;

PyObject* pared::python_error(const std::exception& e) {
  if (dynamic_cast<const TypeError*>(&e)) return PyExc_TypeError;
  return dynamic_cast<const ValueError*>(&e) ? PyExc_ValueError : PyExc_RuntimeError;
}

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "pared's kernels: instruction-set dispatch, sparse formats and operations";
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const pared::TypeError& e) {
      PyErr_SetString(pared::python_error(e), e.what());
    } catch (const pared::ValueError& e) {
      PyErr_SetString(pared::python_error(e), e.what());
    }
  });
  // An unusable PARED_ISA or PARED_NUM_THREADS fails at import, not in the first forward.
  pared::active_isa();
  pared::own_threads();
  pared::register_info(m);
  pared::register_packed(m);
  pared::register_chain(m);
  pared::register_csr(m);
  pared::register_attention(m);
  pared::register_encoder(m);
  pared::register_bitmap(m);
  pared::register_int4(m);
  pared::register_int8(m);
  pared::register_bsr8(m);
  pared::register_conv(m);
  pared::register_pool(m);
  pared::register_reference(m);
  pared::register_probe(m);
  pared::register_topk(m);
}
