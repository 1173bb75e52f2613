// Products of int8 weights: the linear operation with its activations quantized on the way in, and the plain
// integer product.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/int8.h"
#include "ops/linear.h"

namespace pared {

// Bytes between rows of quantized activations: an odd number of cache lines, lest the rows of a power of two
// fall into one set.
int64_t int8_row_stride(int64_t cols);

void linear_int8(const LinearArgs& args, const Int8Packed& w);
bool share_inputs(const Int8Packed& a, const Int8Packed& b);
void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<Int8Packed>>& outputs);

// c[m][n] = sum_k a[m][k] b[n][k], exact for every int8 value, cols <= kGemmMaxCols. Strides in elements.
inline constexpr int64_t kGemmMaxCols = 131071;  // cols * 128 * 128 < 2^31
struct GemmS8Args {
  const int8_t* a;
  int64_t a_stride, rows;
  const int8_t* b;
  int64_t b_stride, outputs;
  int64_t cols;
  int32_t* c;
  int64_t c_stride;
};
void gemm_s8(const GemmS8Args& args);

}  // namespace pared
