#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>

namespace pared {

namespace py = pybind11;

// The Python exception that a C++ one becomes.
PyObject* python_error(const std::exception& e);

// What a function returns that Python calls itself, past pybind11, whose own way to a function takes 3 us
// when other code ran since: the object that f() gives, or the error that it throws.
template <class F>
PyObject* called_directly(const F& f) {
  try {
    return f().release().ptr();
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(python_error(e), e.what());
  }
  return nullptr;
}

// Adds such a function; `method` is static.
inline void add_direct(py::module_& m, PyMethodDef& method) {
  m.add_object(method.ml_name, py::reinterpret_steal<py::object>(PyCFunction_NewEx(
                                   &method, nullptr, py::object(m.attr("__name__")).ptr())));
}

void register_info(py::module_& m);
void register_packed(py::module_& m);
void register_chain(py::module_& m);
void register_csr(py::module_& m);
void register_attention(py::module_& m);
void register_encoder(py::module_& m);
void register_bitmap(py::module_& m);
void register_int4(py::module_& m);
void register_int8(py::module_& m);
void register_bsr8(py::module_& m);
void register_conv(py::module_& m);
void register_pool(py::module_& m);
void register_reference(py::module_& m);
void register_probe(py::module_& m);
void register_topk(py::module_& m);

}  // namespace pared
