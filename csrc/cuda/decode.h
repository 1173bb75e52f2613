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
  DType dtype;  // of 16-bit values and of the activations: f16 or bf16
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
  uint8_t* workspace;  // 16-byte aligned
  bool bulk;           // sm_90's bulk copies, where bulk_copies(device) says that there are any
};
// More than kDecodeMaxTokens are as many launches as it takes, one after the other, in the same workspace of
// decode_workspace_bytes().
void decode_product(const DecodeProduct& a, int device, cudaStream_t stream);

// The dense weight [outputs, cols] in w.dtype, times `scales` where given: what many tokens are multiplied
// with.
void decode_expand(const DecodeWeight& w, const float* scales, void* out, int device, cudaStream_t stream);

// A dense weight on its way into that layout: 16-bit floats for bitmap16 and pairs16, int8 for the others.
struct DecodeDense {
  const void* values;  // [outputs, cols], rows `stride` elements apart
  int64_t outputs, cols, stride;
  DecodeFormat format;
  const uint8_t* mask;  // [outputs, cols] bytes 0 or 1, contiguous: what is kept; null: all
};
// Of a bitmap or of pairs: units[blocks] = the size of each block in 16 bytes; *largest, zero before, the
// greatest of them.
void decode_pack_sizes(const DecodeDense& w, int64_t* units, int64_t* largest, int device,
                       cudaStream_t stream);
// The blocks, at their offsets (of dense8: one after the other).
void decode_pack(const DecodeDense& w, const uint32_t* offsets, uint8_t* blocks, int device,
                 cudaStream_t stream);

}  // namespace pared::cuda
