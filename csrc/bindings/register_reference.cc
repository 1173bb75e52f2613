// The specifications in csrc/ref, for the tests: float64 numpy arrays in and out.
#include <pybind11/numpy.h>

#include "bindings/array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "ref/linear.h"

namespace pared {
namespace {

template <class T>
const T* input(py::handle object, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
  const Array a = parse_array(object, name);
  require_dtype(a, {dtype});
  require_shape(a, shape);
  require_contiguous(a);
  return static_cast<const T*>(a.data);
}

}  // namespace

void register_reference(py::module_& m) {
  m.def(
      "linear_reference",
      [](py::handle x, py::handle row_ptr, py::handle columns, py::handle values, py::handle bias) {
        const Array ax = parse_array(x, "x"), ap = parse_array(row_ptr, "row_ptr"),
                    av = parse_array(values, "values");
        require_shape(ax, {-1, -1});
        PARED_CHECK(ap.ndim == 1 && ap.shape[0] >= 1, "row_ptr: expected [rows + 1], got ", ap.shape_text());
        PARED_CHECK(av.ndim == 1, "values: expected one dimension, got ", av.shape_text());
        LinearReference a{};
        a.tokens = ax.shape[0];
        a.cols = ax.shape[1];
        a.rows = ap.shape[0] - 1;
        const int64_t nnz = av.shape[0];
        a.x = input<double>(x, "x", DType::f64, {-1, -1});
        a.row_ptr = input<int64_t>(row_ptr, "row_ptr", DType::i64, {-1});
        a.columns = input<int64_t>(columns, "columns", DType::i64, {nnz});
        a.values = input<double>(values, "values", DType::f64, {-1});
        if (!bias.is_none()) a.bias = input<double>(bias, "bias", DType::f64, {a.rows});
        PARED_CHECK(a.row_ptr[0] == 0 && a.row_ptr[a.rows] == nnz, "row_ptr: expected to span 0 to ", nnz);
        for (int64_t r = 0; r < a.rows; ++r)
          PARED_CHECK(a.row_ptr[r] <= a.row_ptr[r + 1], "row_ptr: expected a non-decreasing sequence");
        for (int64_t i = 0; i < nnz; ++i)
          PARED_CHECK(a.columns[i] >= 0 && a.columns[i] < a.cols, "columns: expected 0 to ", a.cols - 1,
                      ", got ", a.columns[i]);
        py::array_t<double> y({a.tokens, a.rows}), magnitude({a.tokens, a.rows});
        a.y = y.mutable_data();
        a.magnitude = magnitude.mutable_data();
        {
          py::gil_scoped_release unlocked;
          linear_reference(a);
        }
        return py::make_tuple(y, magnitude);
      },
      py::arg("x"), py::arg("row_ptr"), py::arg("columns"), py::arg("values"), py::arg("bias") = py::none());
}

}  // namespace pared
