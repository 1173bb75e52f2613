#include "ref/layer_norm.h"

#include <cmath>

namespace pared {

void layer_norm_reference(const LayerNormReference& a) {
  for (int64_t r = 0; r < a.rows; ++r) {
    double* y = a.y + r * a.cols;
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < a.cols; ++c) {
      y[c] = a.x[r * a.cols + c] + (a.residual ? a.residual[r * a.cols + c] : 0.0);
      mean += y[c] / static_cast<double>(a.cols);
    }
    for (int64_t c = 0; c < a.cols; ++c)
      variance += (y[c] - mean) * (y[c] - mean) / static_cast<double>(a.cols);
    for (int64_t c = 0; c < a.cols; ++c)
      y[c] = (y[c] - mean) / std::sqrt(variance + a.eps) * (a.weight ? a.weight[c] : 1.0) +
             (a.bias ? a.bias[c] : 0.0);
  }
}

}  // namespace pared
