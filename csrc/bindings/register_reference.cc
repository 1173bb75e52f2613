// The specifications in csrc/ref, for the tests: numpy arrays in and out.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "ref/attention.h"
#include "ref/layer_norm.h"
#include "ref/linear.h"
#include "ref/random_cases.h"
#include "ref/selection.h"

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
      "attention_reference",
      [](py::handle q, py::handle k, py::handle v, py::handle mask, double scale, bool causal) {
        const Array aq = parse_array(q, "q"), av = parse_array(v, "v");
        require_shape(aq, {-1, -1, -1});
        require_shape(av, {aq.shape[0], -1, -1});
        AttentionReference a{};
        a.heads = aq.shape[0], a.queries = aq.shape[1], a.features = aq.shape[2];
        a.keys = av.shape[1], a.out_features = av.shape[2];
        a.q = input<double>(q, "q", DType::f64, {-1, -1, -1});
        a.k = input<double>(k, "k", DType::f64, {a.heads, a.keys, a.features});
        a.v = input<double>(v, "v", DType::f64, {-1, -1, -1});
        if (!mask.is_none()) a.mask = input<double>(mask, "mask", DType::f64, {a.heads, a.queries, a.keys});
        a.scale = scale, a.causal = causal;
        py::array_t<double> y({a.heads, a.queries, a.out_features}),
            error({a.heads, a.queries, a.out_features});
        a.y = y.mutable_data(), a.error = error.mutable_data();
        {
          py::gil_scoped_release unlocked;
          attention_reference(a);
        }
        return py::make_tuple(y, error);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("scale"), py::arg("causal"));

  m.def(
      "layer_norm_reference",
      [](py::handle x, py::handle residual, py::handle weight, py::handle bias, double eps) {
        const Array ax = parse_array(x, "x");
        require_shape(ax, {-1, -1});
        const int64_t rows = ax.shape[0], cols = ax.shape[1];
        LayerNormReference a{};
        a.x = input<double>(x, "x", DType::f64, {-1, -1});
        if (!residual.is_none()) a.residual = input<double>(residual, "residual", DType::f64, {rows, cols});
        if (!weight.is_none()) a.weight = input<double>(weight, "weight", DType::f64, {cols});
        if (!bias.is_none()) a.bias = input<double>(bias, "bias", DType::f64, {cols});
        a.eps = eps, a.rows = rows, a.cols = cols;
        py::array_t<double> y({rows, cols});
        a.y = y.mutable_data();
        layer_norm_reference(a);
        return y;
      },
      py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("eps"));

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

  m.def(
      "selection_reference",
      [](py::handle keys, int64_t k, py::handle order) {
        const Array a = parse_array(keys, "keys");
        require_dtype(a, {DType::f32});
        require_shape(a, {-1, -1});
        require_contiguous(a);
        const int64_t rows = a.shape[0], cols = a.shape[1];
        PARED_CHECK(k >= 0 && k <= cols, "k: expected 0 to ", cols, ", got ", k);
        py::array_t<int64_t> indices({rows, cols}), above(rows), ties(rows);
        if (!order.is_none()) {
          const int64_t* given = input<int64_t>(order, "order", DType::i64, {rows, cols});
          for (int64_t i = 0; i < rows * cols; ++i)
            PARED_CHECK(given[i] >= 0 && given[i] < cols, "order: expected 0 to ", cols - 1, ", got ",
                        given[i]);
          std::copy_n(given, rows * cols, indices.mutable_data());
        }
        py::array_t<bool> mask({rows, cols});
        py::array_t<float> value(rows);
        const SelectionReference args{static_cast<const float*>(a.data),
                                      rows,
                                      cols,
                                      k,
                                      indices.mutable_data(),
                                      mask.mutable_data(),
                                      value.mutable_data(),
                                      above.mutable_data(),
                                      ties.mutable_data()};
        {
          py::gil_scoped_release unlocked;
          selection_reference(args, !order.is_none());
        }
        return py::make_tuple(indices, mask, value, above, ties);
      },
      py::arg("keys"), py::arg("k"), py::arg("order") = py::none());

  m.def("random_families", [] { return random_families(); });
  m.def(
      "random_cases",
      [](const std::string& family, uint64_t seed, int64_t cases, bool fault) {
        RandomCases r;
        {
          py::gil_scoped_release unlocked;
          r = run_random_cases(family, seed, cases, fault);
        }
        return py::make_tuple(r.failed, r.seed, r.what);
      },
      py::arg("family"), py::arg("seed"), py::arg("cases"), py::arg("fault") = false);
}

}  // namespace pared
