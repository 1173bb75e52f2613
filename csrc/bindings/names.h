// Names that come from Python, for both extension modules.
#pragma once

#include <string>

#include "core/check.h"
#include "core/dtype.h"
#include "kernels/types.h"

namespace pared {

// "" and "none" are no activation.
inline Activation parse_activation(const std::string& name) {
  if (name.empty() || name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  throw ValueError(str("activation: expected one of relu, gelu, gelu_tanh, silu or None, got '", name, "'"));
}

inline DType parse_float_dtype(const std::string& name) {
  for (DType t : {DType::f32, DType::f16, DType::bf16})
    if (name == dtype_name(t)) return t;
  throw ValueError(str("dtype: expected float32, float16 or bfloat16, got '", name, "'"));
}

}  // namespace pared
