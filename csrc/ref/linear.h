// The specification of linear on a sparse weight: scalar, double, one term after the other.
#pragma once

#include <cstdint>

namespace pared {

struct LinearReference {
  const double* x;         // [tokens, cols]
  const int64_t* row_ptr;  // CSR of the weight, [rows, cols]
  const int64_t* columns;
  const double* values;
  const double* bias;  // [rows] or null
  int64_t tokens, rows, cols;
  double* y;          // [tokens, rows]: x W^T + bias
  double* magnitude;  // [tokens, rows]: |x| |W|^T + |bias|, what rounding errors are proportional to
};

// Absent weights contribute nothing, whatever x holds: 0 * inf is skipped.
void linear_reference(const LinearReference& a);

}  // namespace pared
