// A whole layer of a transformer encoder: attention and a feed-forward pair, each with its residual and its
// normalisation, composed of the operations that exist.
#pragma once

#include <cstdint>

#include "ops/packed_linear.h"

namespace pared {

struct EncoderLinear {
  LinearWeight w;
  const float* bias;  // [rows] or null
  Activation activation;
};

// A vector [features] of f32, f16 or bf16, or null.
struct EncoderVector {
  const void* data;
  DType dtype;
};

struct EncoderNorm {
  EncoderVector weight, bias;
  float eps;
};

struct EncoderLayer {
  EncoderLinear q, k, v, out, up, down;
  EncoderNorm first, second;
  int64_t features;  // of the layer's input and output
  int64_t heads;
  float scale;
  // false: y = second(h + ff(h)), h = first(x + attention(x)).
  // true:  y = h + ff(second(h)), h = x + attention(first(x)).
  bool norm_first;
};

struct EncoderArgs {
  const void* x;  // [batch, tokens, features], or [tokens, batch, features], contiguous
  void* y;        // the same
  DType dtype;    // of x and y: f32, f16 or bf16; everything between is float32
  bool batch_first;
  int64_t batch, tokens;
  bool causal;
  // As of AttentionArgs.
  const void* mask;
  bool mask_bytes;
  DType mask_dtype;
  int64_t mask_strides[4];
};

void encoder_layer(const EncoderLayer& layer, const EncoderArgs& args);

}  // namespace pared
