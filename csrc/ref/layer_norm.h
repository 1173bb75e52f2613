// The specification of layer normalisation: scalar, double, two passes.
#pragma once

#include <cstdint>

namespace pared {

struct LayerNormReference {
  const double *x, *residual;   // [rows, cols]; residual or null
  const double *weight, *bias;  // [cols], or null for 1 and 0
  double eps;
  int64_t rows, cols;
  double* y;  // [rows, cols]
};

void layer_norm_reference(const LayerNormReference& a);

}  // namespace pared
