// Products with unstructured sparse weights: float32, float16 or bfloat16, sums in float32, in an order that
// depends on the weight and the number of tokens alone: the same bits on every call.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/csr_plan.h"
#include "kernels/types.h"

namespace pared::cuda {

// Consecutive rows of about as many non-zeros as any other item has, and how many threads share a row: a
// power of two, 4 to kCsrThreads. (end - begin) * max(1, lanes / 32) is at most kCsrGatherSums.
struct CsrItem {
  int32_t begin, end, lanes;
};

struct CsrWeight {
  const void* values;      // 16-byte aligned; csr_plan.h says how these three lie
  const void* columns;     // 8-byte aligned
  const uint32_t* starts;  // [outputs * blocks + 1]
  DType dtype;
  bool near;  // the way of the columns
  int32_t block_cols;
  int32_t slots;                 // of a block
  int32_t blocks, range_blocks;  // of a row; of an index range
  int64_t outputs, cols;
  const CsrItem* items;  // cover all rows
  int64_t item_count;
  // [outputs rounded up to kCsrGroup]: the rows of each group, dealt to the warps so that their shares are
  // equal; -1 behind the last row.
  const int32_t* order;
};

// y = activation(x W^T + bias).
struct CsrProduct {
  CsrWeight w;
  const void* x;  // [tokens, cols] in w.dtype, rows x_stride elements apart
  int64_t tokens, x_stride;
  const float* bias;  // [outputs], or null: zeros
  Activation activation;
  void* y;  // [tokens, outputs] in w.dtype
  int64_t y_stride;
  uint8_t* workspace;  // 16-byte aligned
};
void csr_product(const CsrProduct& a, const CsrPlan& plan, int device, cudaStream_t stream);

}  // namespace pared::cuda
