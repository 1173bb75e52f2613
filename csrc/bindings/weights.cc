#include "bindings/weights.h"

#include <cstdlib>

#include "core/check.h"

namespace pared {

const uint8_t* packed_bytes(const Array& a) {
  require_dtype(a, {DType::u8});
  require_shape(a, {-1});
  require_contiguous(a);
  return static_cast<const uint8_t*>(a.data);
}

CsrPacked packed_csr(const Array& a) { return view_csr(packed_bytes(a), a.size()); }

Activation parse_activation(const std::string& name) {
  if (name.empty() || name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  throw ValueError(str("activation: expected one of relu, gelu, gelu_tanh, silu or None, got '", name, "'"));
}

const float* parse_bias(py::handle bias, int64_t rows, const Array& out) {
  if (bias.is_none()) return nullptr;
  const Array a = parse_array(bias, "bias");
  require_dtype(a, {DType::f32});
  require_shape(a, {rows});
  require_contiguous(a);
  require_disjoint(out, a);
  return static_cast<const float*>(a.data);
}

LinearArgs parse_linear(py::handle x, const Array& packed, const PackedHeader& h, py::handle bias,
                        py::handle out, const std::string& activation) {
  const Array ax = parse_array(x, "x"), ay = parse_array(out, "out");
  require_dtype(ax, kFloatTypes);
  require_dtype(ay, {ax.dtype});
  require_writable(ay);
  const Rows rx = fold_rows(ax), ry = fold_rows(ay);
  PARED_CHECK(rx.cols == h.cols, "x: expected a last dimension of ", h.cols, " (the weight's inputs), got ",
              ax.shape_text());
  PARED_CHECK(ry.rows == rx.rows && ry.cols == h.rows, "out: expected shape [..., ", h.rows,
              "] with the leading dimensions of x, got ", ay.shape_text());
  PARED_CHECK(ry.rows <= 1 || std::abs(ry.stride) >= ry.cols,
              "out: expected rows that do not overlap, got stride ", ry.stride, " for ", ry.cols,
              " elements");
  require_disjoint(ay, ax);
  require_disjoint(ay, packed);
  return {ax.data, rx.stride, rx.rows, ax.dtype, parse_bias(bias, h.rows, ay), parse_activation(activation),
          ay.data, ry.stride};
}

}  // namespace pared
