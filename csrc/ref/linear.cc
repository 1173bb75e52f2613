#include "ref/linear.h"

#include <cmath>

namespace pared {

void linear_reference(const LinearReference& a) {
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t r = 0; r < a.rows; ++r) {
      double sum = a.bias ? a.bias[r] : 0.0, magnitude = std::fabs(sum);
      for (int64_t i = a.row_ptr[r]; i < a.row_ptr[r + 1]; ++i) {
        const double term = a.values[i] * a.x[t * a.cols + a.columns[i]];
        sum += term;
        magnitude += std::fabs(term);
      }
      a.y[t * a.rows + r] = sum;
      a.magnitude[t * a.rows + r] = magnitude;
    }
}

}  // namespace pared
