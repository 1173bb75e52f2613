#include "bindings/weights.h"

#include "core/check.h"

namespace pared {

CsrPacked packed_csr(const Array& a) {
  require_dtype(a, {DType::u8});
  require_shape(a, {-1});
  require_contiguous(a);
  return view_csr(static_cast<const uint8_t*>(a.data), a.size());
}

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

}  // namespace pared
