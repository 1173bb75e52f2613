#include "bindings/weights.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "core/check.h"

namespace pared {

const uint8_t* packed_bytes(const Array& a) {
  require_dtype(a, {DType::u8});
  require_shape(a, {-1});
  require_contiguous(a);
  return static_cast<const uint8_t*>(a.data);
}

CsrPacked packed_csr(const Array& a) { return view_csr(packed_bytes(a), a.size()); }

DenseView dense_view(const Array& a, ConvShape& conv, int64_t groups) {
  PARED_CHECK(a.ndim == 2 || a.ndim == 4, a.name, ": expected [out, in] or [out, in/groups, kh, kw], got ",
              a.shape_text());
  if (a.ndim == 2) return {a.data, a.dtype, a.shape[0], a.shape[1], a.strides[0], a.strides[1]};
  require_contiguous(a);
  PARED_CHECK(groups >= 1 && a.shape[0] % groups == 0, "groups: expected a positive divisor of ", a.shape[0],
              " output channels, got ", groups);
  for (int i = 1; i < 4; ++i)
    PARED_CHECK(a.shape[i] > 0 && a.shape[i] < (int64_t{1} << 31), a.name,
                ": expected channels and kernel sizes of at least 1, got ", a.shape_text());
  conv = {static_cast<int32_t>(a.shape[1]), static_cast<int32_t>(a.shape[2]),
          static_cast<int32_t>(a.shape[3]), static_cast<int32_t>(groups)};
  const int64_t cols = a.shape[1] * a.shape[2] * a.shape[3];
  return {a.data, a.dtype, a.shape[0], cols, cols, 1, groups};
}

ActivationRange parse_activations(py::handle given) {
  if (given.is_none()) return {};
  try {
    const auto [number, zero, low, high] = py::cast<std::tuple<double, int32_t, int32_t, int32_t>>(given);
    const float scale = static_cast<float>(number);
    // 0 would stand for dynamic; what else is wrong, packing finds.
    PARED_CHECK(scale != 0.0f, "activation_scale: expected a positive number, got ", number);
    return {scale, zero, low, high};
  } catch (const py::cast_error&) {
    const auto text = py::reinterpret_steal<py::object>(PyObject_ASCII(given.ptr()));
    if (!text) throw py::error_already_set();
    throw TypeError(
        str("activations: expected None or (scale, zero, low, high), a number and three bytes, got ",
            py::cast<std::string>(text).substr(0, 60)));
  }
}

Activation activation_of(py::handle given) {
  if (given.is_none()) return Activation::none;
  if (!PyUnicode_Check(given.ptr()))
    throw TypeError(str("activation: expected a string, got ",
                        std::string(py::str(py::type::handle_of(given).attr("__name__")))));
  // Escaped, so that whatever came can be said in the error.
  const auto text = py::reinterpret_steal<py::object>(
      PyUnicode_IS_ASCII(given.ptr()) ? given.inc_ref().ptr() : PyObject_ASCII(given.ptr()));
  if (!text) throw py::error_already_set();
  return parse_activation(py::cast<std::string>(text));
}

const float* parse_bias(py::handle bias, int64_t rows, const Array* out) {
  if (bias.is_none()) return nullptr;
  const Array a = parse_array(bias, "bias");
  require_dtype(a, {DType::f32});
  require_shape(a, {rows});
  require_contiguous(a);
  if (out) require_disjoint(*out, a);
  return static_cast<const float*>(a.data);
}

Rows parse_input(const Array& x, int64_t cols) {
  require_dtype(x, kFloatTypes);
  const Rows r = fold_rows(x);
  PARED_CHECK(r.cols == cols, "x: expected a last dimension of ", cols, " (the weight's inputs), got ",
              x.shape_text());
  return r;
}

RowsPair parse_rows(const Array& x, const Array& out, int64_t cols, int64_t rows) {
  const Rows rx = parse_input(x, cols);
  require_dtype(out, {x.dtype});
  require_writable(out);
  const Rows ry = fold_rows(out);
  PARED_CHECK(ry.rows == rx.rows && ry.cols == rows, "out: expected shape [..., ", rows,
              "] with the leading dimensions of x, got ", out.shape_text());
  PARED_CHECK(ry.rows <= 1 || std::abs(ry.stride) >= ry.cols,
              "out: expected rows that do not overlap, got stride ", ry.stride, " for ", ry.cols,
              " elements");
  require_disjoint(out, x);
  return {rx, ry};
}

LinearCall parse_linear(py::handle x, const Array& packed, const PackedHeader& h, py::handle bias,
                        py::handle out, Activation activation) {
  const Array ax = parse_array(x, "x");
  if (out.is_none()) {
    const Rows rx = parse_input(ax, h.cols);
    const float* b = parse_bias(bias, h.rows);
    int64_t shape[Array::kMaxDims];
    std::copy_n(ax.shape, ax.ndim - 1, shape);
    shape[ax.ndim - 1] = h.rows;
    NewArray y = new_array(x, ax.dtype, shape, ax.ndim);
    return {{ax.data, rx.stride, rx.rows, ax.dtype, b, activation, y.data, h.rows}, std::move(y.object)};
  }
  const Array ay = parse_array(out, "out");
  const RowsPair r = parse_rows(ax, ay, h.cols, h.rows);
  require_disjoint(ay, packed);
  const float* b = parse_bias(bias, h.rows, &ay);
  return {{ax.data, r.x.stride, r.x.rows, ax.dtype, b, activation, ay.data, r.y.stride},
          py::reinterpret_borrow<py::object>(out)};
}

}  // namespace pared
