// Linear layers one after the other, with the panel handed from each to the next: what lies between two of
// them is never transposed into rows of tokens and back.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/csr.h"
#include "kernels/types.h"

namespace pared {

struct ChainStage {
  CsrPacked w;
  const float* bias;  // [rows] or null
  Activation activation;
};

struct ChainArgs {
  const void* x;  // [tokens, cols of the first stage], unit stride along cols
  int64_t x_stride;
  int64_t tokens;
  DType dtype;  // of x and y; between the stages everything is float32
  void* y;      // [tokens, rows of the last stage], unit stride along rows
  int64_t y_stride;
};

// y = a_n(W_n ... a_1(W_1 x + b_1) ... + b_n). Each stage has as many columns as the one before has rows; at
// least two stages.
void linear_chain_csr(const ChainArgs& args, const std::vector<ChainStage>& stages);

}  // namespace pared
