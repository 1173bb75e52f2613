// A whole layer of a transformer encoder: attention and a feed-forward pair, each with its residual and its
// normalisation, composed of the operations that exist.
#pragma once

#include <cstdint>
#include <optional>

#include "formats/bsr8.h"
#include "ops/packed_linear.h"

namespace pared {

struct EncoderLinear {
  PackedLinear w;
  std::optional<Bsr8Packed> blocks;  // where several of them may share an input
  const float* bias;                 // [rows] or null
  Activation activation;
};

struct EncoderNorm {
  const float *weight, *bias;  // [features], or null
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
  const float* x;  // [batch, tokens, features], or [tokens, batch, features], contiguous
  float* y;        // the same
  bool batch_first;
  int64_t batch, tokens;
  bool causal;
  // As of AttentionArgs.
  const void* mask;
  bool mask_bytes;
  int64_t mask_strides[4];
};

void encoder_layer(const EncoderLayer& layer, const EncoderArgs& args);

}  // namespace pared
