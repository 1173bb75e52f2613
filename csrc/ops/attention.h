// Scaled dot-product attention: softmax(scale q k^T + mask) v.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pared {

// [batch, heads, positions, features]; strides in elements, of features 1.
struct Heads {
  void* data;
  int64_t batch_stride, head_stride, position_stride;
  void* at(int64_t batch, int64_t head, int64_t position, DType dtype) const {
    return static_cast<char*>(data) +
           (batch * batch_stride + head * head_stride + position * position_stride) * dtype_size(dtype);
  }
};

struct AttentionArgs {
  Heads q, k, v, y;
  int64_t batch, heads, queries, keys;
  int64_t features, out_features;  // of q and k; of v and y
  int64_t shared;                  // heads of q that share one of k and v
  float scale;
  bool causal;  // query i sees the keys up to i
  // [batch, heads, queries, keys], strides in elements, 0 where it is broadcast: added to the scores, of
  // mask_dtype, or bytes that are 0 for keys that are not seen. Null: none.
  const void* mask;
  bool mask_bytes;
  int64_t mask_strides[4];
  // Of q, k, v and y: f32, f16 or bf16. Everything is computed in float32.
  DType dtype = DType::f32;
  DType mask_dtype = DType::f32;  // f32, f16 or bf16
};

void attention(const AttentionArgs& args);

}  // namespace pared
