// Scaled dot-product attention: softmax(scale q k^T + mask) v.
#pragma once

#include <cstdint>

namespace pared {

// float32 [batch, heads, positions, features]; strides in elements, of features 1.
struct Heads {
  float* data;
  int64_t batch_stride, head_stride, position_stride;
  float* at(int64_t batch, int64_t head, int64_t position) const {
    return data + batch * batch_stride + head * head_stride + position * position_stride;
  }
};

struct AttentionArgs {
  Heads q, k, v, y;
  int64_t batch, heads, queries, keys;
  int64_t features, out_features;  // of q and k; of v and y
  int64_t shared;                  // heads of q that share one of k and v
  float scale;
  bool causal;  // query i sees the keys up to i
  // [batch, heads, queries, keys], strides in elements, 0 where it is broadcast: added to the scores as
  // float32, or bytes that are 0 for keys that are not seen. Null: none.
  const void* mask;
  bool mask_bytes;
  int64_t mask_strides[4];
};

void attention(const AttentionArgs& args);

}  // namespace pared
