// Elements of the user's weights, and which of them a sparse format stores.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "kernels/generic/half.h"

namespace pared {

// Element `i` of f32, f16 or bf16 data.
inline float value_at(const void* data, int64_t i, DType t) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::bf16: return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
    default: return f16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

// The same, written: rounded to nearest even.
inline void store_value(void* data, int64_t i, DType t, float v) {
  if (t == DType::f32) static_cast<float*>(data)[i] = v;
  else static_cast<uint16_t*>(data)[i] = t == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
}

// Zeros and denormals are not stored: a denormal operand slows a multiply-add a hundredfold on some
// processors and moves no result by more than 1e-38 of an input.
inline bool is_stored(float v) { return std::fabs(v) >= FLT_MIN; }

}  // namespace pared
