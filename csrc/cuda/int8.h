// 8-bit products: activations quantized a token at a time, an exact int32 product on tensor cores, and an
// epilogue with scales, bias and activation. The numbers are those of the CPU kernels: the same bytes, the
// same sums, the same three roundings; activations are torch's to within a few ulp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/int8_plan.h"
#include "kernels/types.h"

namespace pared::cuda {

// q[r][c] = clamp(round(x / scale) + zero, low, high) - 128, scales[r]. kernels/int8_types.h says what scale
// 0 (dynamic by row) and rows with NaN or infinity become. The rows of q are padded with zeros.
struct QuantizeRows {
  const void* x;
  DType dtype;  // f32, f16, bf16
  int64_t rows, cols, x_stride;
  float scale;
  int32_t zero, low, high;
  int8_t* q;
  int64_t q_stride;  // a multiple of kInt8Align, at least cols
  float* scales;
};
void quantize_rows(const QuantizeRows& a, int device, cudaStream_t stream);

// Bytes at any address into rows that begin at multiples of kInt8Align, zeros behind them.
struct PadRows {
  const int8_t* x;
  int64_t rows, cols, x_stride, column_stride;
  int8_t* out;
  int64_t out_stride;
};
void pad_rows(const PadRows& a, int device, cudaStream_t stream);

// sum[m][n] = sum over k of a[m][k] b[n][k], exact modulo 2^32. Then y = sum as int32, or, with `w_scales`,
// y = activation((sum + correction[n]) * x_scales[m] * w_scales[n] + bias[n]) in `dtype`.
struct Int8Product {
  const int8_t *a, *b;  // 16-byte aligned rows, zeros beyond `cols` up to the next multiple of 16
  int64_t tokens, outputs, cols, a_stride, b_stride;
  const float *x_scales, *w_scales;  // null: y is the int32 sum
  const int32_t* correction;         // null: zeros
  const float* bias;                 // null: zeros
  Activation activation;
  DType dtype;
  void* y;
  int64_t y_stride;
  uint8_t* workspace;  // plan_int8(...).workspace_bytes
};
void int8_product(const Int8Product& a, int device, cudaStream_t stream);

// For tuning and tests: every later product takes this tile (an index as in Int8Plan::tile) where it can; -1:
// the one that is thought fastest. A wgmma tile needs int8_wgmma(device), scales, and rows of y at multiples
// of 16 bytes.
void force_int8_tile(int tile);
int forced_int8_tile();
bool int8_wgmma(int device);  // whether this build and that device have the kernels for sm_90a

}  // namespace pared::cuda
