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

// Inputs that several weights take in one call, as in LinearArgs, and what is each weight's own. What the
// inputs have to become before they are multiplied, a panel or bytes, is made once for all of the weights;
// the bits of the outputs are those of a call for each.
struct SharedInputs {
  const void* x;
  int64_t x_stride;
  int64_t tokens;
  DType dtype;
};
template <class Packed>
struct SharedOutput {
  Packed w;
  const float* bias;
  Activation activation;
  void* y;
  int64_t y_stride;
  int64_t residual = 0;  // as in PanelStoreArgs; of CSR
};

// For each kind of weight: whether a call takes both, which are packed alike then, and the call for one or
// more of them.
bool share_inputs(const CsrPacked& a, const CsrPacked& b);
void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<CsrPacked>>& outputs);

// Activations are quantised a token at a time (quantize_u8): y = activation(float(sum of q_x q_w) *
// (scale_w
// * scale_x) + bias), the sum exact in int32, so that a result has the same bits on every level.
void linear_bsr8(const LinearArgs& args, const Bsr8Packed& w);
bool share_inputs(const Bsr8Packed& a, const Bsr8Packed& b);
void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<Bsr8Packed>>& outputs);

}  // namespace pared
