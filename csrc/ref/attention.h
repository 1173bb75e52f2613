// The specification of attention: scalar, double, one term after the other.
#pragma once

#include <cstdint>

namespace pared {

struct AttentionReference {
  const double* q;     // [heads, queries, features]
  const double* k;     // [heads, keys, features]
  const double* v;     // [heads, keys, out_features]
  const double* mask;  // [heads, queries, keys], added to the scores; or null
  double scale;
  bool causal;  // query i sees the keys up to i
  int64_t heads, queries, keys, features, out_features;
  double* y;  // [heads, queries, out_features]: softmax(scale q k^T + mask) v, 0 where nothing is seen
  // The same shape: how far from y a computation in float32 may be. A score is a sum of D products, off by at
  // most (2 D + 4) eps times the sum of their magnitudes (a rounding a product where nothing is fused), and
  // its sum with the mask by eps of that. What a score is off, its weight is off relatively, once for itself
  // and once for the largest, which is subtracted; the exponent's own roundings are in proportion to it, and
  // sums over K keys add K eps, once for the weights and once for the outputs.
  double* error;
};

void attention_reference(const AttentionReference& a);

}  // namespace pared
