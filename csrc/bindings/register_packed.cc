// What can be done with a packed weight of any format.
#include <algorithm>
#include <string>
#include <utility>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/formats.h"
#include "ops/packed_linear.h"

namespace pared {
namespace {

// activation(x @ w.T + bias) with a packed weight of any format, into `out` or, for None, a new array of x's
// kind.
py::object run_linear(py::handle x, py::handle packed, py::handle bias, py::handle activation,
                      py::handle out) {
  refuse_grad({{x, "x"}, {bias, "bias"}});
  const Array ap = parse_array(packed, "packed");
  const PackedHeader& h = checked_header(packed_bytes(ap), ap.size());
  PARED_CHECK(h.kh == 0, "w: expected a linear weight [out, in], got shape [", h.rows, ", ", h.channels, ", ",
              h.kh, ", ", h.kw, "]; use conv2d");
  const LinearWeight w = view_linear(packed_bytes(ap), ap.size());
  LinearCall call = parse_linear(x, ap, h, bias, out, activation_of(activation));
  py::gil_scoped_release unlocked;
  linear(call.args, w);
  return std::move(call.out);
}

PyObject* call_linear(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 4 && n != 5) return PyErr_Format(PyExc_TypeError, "linear: expected 4 or 5 arguments, got %zd", n);
  return called_directly(
      [&] { return run_linear(args[0], args[1], args[2], args[3], n == 5 ? args[4] : Py_None); });
}
PyMethodDef g_linear = {
    "linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_linear)), METH_FASTCALL,
    "linear(x: object, packed: object, bias: object, activation: object, out: object = None) -> object"};

}  // namespace

void register_packed(py::module_& m) {
  add_direct(m, g_linear);

  m.def(
      "packed_info",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const uint8_t* data = packed_bytes(a);
        const PackedFormat& format = format_of(data, a.size());
        format.check(data, a.size());
        const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data);
        py::dict d;
        d["kind"] = format.name;
        d["rows"] = h.rows;
        d["cols"] = h.cols;
        d["nnz"] = h.nnz;
        d["dtype"] = dtype_name(h.dtype);
        d["channels"] = h.channels;
        d["kh"] = h.kh;
        d["kw"] = h.kw;
        d["groups"] = h.groups;
        d["tile"] = h.tile;
        d["block_k"] = h.block_k;
        d["entry_rows"] = h.entry_rows;
        d["entries"] = h.entries;
        return d;
      },
      py::arg("packed"));

  m.def(
      "packed_copy",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const uint8_t* data = packed_bytes(a);
        const auto bytes = static_cast<size_t>(a.size());
        return packed_array(bytes, [&](uint8_t* out) { std::copy_n(data, bytes, out); });
      },
      py::arg("packed"),
      "A copy of a packed weight, aligned whether or not `packed` is, and in huge pages where it is large.");
  m.def(
      "packed_validate",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const uint8_t* data = packed_bytes(a);
        py::gil_scoped_release unlocked;
        format_of(data, a.size()).validate(data, a.size());
      },
      py::arg("packed"));

  m.def(
      "packed_unpack_dense",
      [](py::handle packed, py::handle out) {
        const Array a = parse_array(packed, "packed"), o = parse_array(out, "out");
        const uint8_t* data = packed_bytes(a);
        const PackedFormat& format = format_of(data, a.size());
        format.check(data, a.size());
        require_dtype(o, kFloatTypes);
        require_contiguous(o);
        require_writable(o);
        const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data);
        const int64_t size = h.rows * dense_cols(h);
        PARED_CHECK(o.size() == size, "out: expected ", size, " elements, got ", o.shape_text());
        py::gil_scoped_release unlocked;
        format.unpack_dense(data, a.size(), o.dtype, o.data);
      },
      py::arg("packed"), py::arg("out"));
}

}  // namespace pared
