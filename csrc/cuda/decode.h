// Products of few tokens, where reading the weight is the cost: sparse weights as bitmaps and non-zeros, and
// 8-bit weights, read once at the speed of memory and expanded in registers for the tensor cores.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/decode_plan.h"
#include "kernels/types.h"

namespace pared::cuda {

struct DecodeWeight {
  const uint8_t* blocks;    // 16-byte aligned; decode_plan.h says what is in them
  const uint32_t* offsets;  // [block rows * block columns + 1], in 16 bytes
  DecodeFormat format;
  DType dtype;  // of bitmap16's values and of the activations: f16 or bf16
  int64_t outputs, cols;
  int64_t largest_block;  // in bytes
};

// y = activation(x W^T * scales + bias), sums in float32, in an order that depends on the shapes alone: the
// same bits on every call.
struct DecodeProduct {
  DecodeWeight w;
  const void* x;  // [tokens, cols] in w.dtype, rows x_stride elements apart
  int64_t tokens, x_stride;
  const float* scales;  // [outputs], or null: ones
  const float* bias;    // [outputs], or null: zeros
  Activation activation;
  void* y;  // [tokens, outputs] in w.dtype
  int64_t y_stride;
  uint8_t* workspace;
  bool bulk;  // sm_90's bulk copies, where bulk_copies(device) says that there are any
};
// What a launch will use; for the workspace's size.
DecodePlan decode_plan(const DecodeWeight& w, int64_t tokens, int device);
void decode_product(const DecodeProduct& a, int device, cudaStream_t stream);

// The dense weight [outputs, cols] in w.dtype, times `scales` where given: what many tokens are multiplied
// with.
void decode_expand(const DecodeWeight& w, const float* scales, void* out, int device, cudaStream_t stream);

}  // namespace pared::cuda
