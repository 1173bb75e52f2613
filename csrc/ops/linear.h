// y = activation(x W^T + bias) with a packed weight: chooses kernel, tiles and threads.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/bsr8.h"
#include "formats/csr.h"
#include "kernels/types.h"

namespace pared {

struct LinearArgs {
  const void* x;  // [tokens, cols], unit stride along cols
  int64_t x_stride;
  int64_t tokens;
  DType dtype;        // of x and y: f32, f16, bf16
  const float* bias;  // [rows] or null
  Activation activation;
  void* y;  // [tokens, rows], unit stride along rows
  int64_t y_stride;
  int64_t residual = 0;  // as in PanelStoreArgs; of linear_csr
};

void linear_csr(const LinearArgs& args, const CsrPacked& w);

// Activations are quantised a token at a time (quantize_u8): y = activation(float(sum of q_x q_w) *
// (scale_w
// * scale_x) + bias), the sum exact in int32, so that a result has the same bits on every level.
void linear_bsr8(const LinearArgs& args, const Bsr8Packed& w);

// The same for several weights that take the same inputs, each to an output of its own: a token is quantised
// once. The bits are those of a call for each.
struct SharedOutput {
  Bsr8Packed w;
  const float* bias;  // as in LinearArgs
  Activation activation;
  void* y;
  int64_t y_stride;
};
// Whether a call takes both: they are packed alike, and quantise alike.
bool share_inputs(const Bsr8Packed& a, const Bsr8Packed& b);
void linear_bsr8_shared(const void* x, int64_t x_stride, int64_t tokens, DType dtype,
                        const std::vector<SharedOutput>& outputs);

}  // namespace pared
