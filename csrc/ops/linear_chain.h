// Linear layers one after the other, a few tokens at a time: what lies between two of them stays in the
// cache. Float32 weights hand over their panel, so that it is not even transposed into rows of tokens and
// back. Int8 weights hand over rows: the next one quantises a token as soon as its last output is there, with
// the bytes that it would have read from memory, so that results are those of a call a layer, to the bit.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/packed_linear.h"

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

// A stage that reads and writes rows of tokens.
struct RowStage {
  LinearWeight w;
  const float* bias;  // [rows] or null
  Activation activation;
};

// The same with rows between the stages, of args.dtype; at least two stages.
void linear_chain_rows(const ChainArgs& args, const std::vector<RowStage>& stages);

}  // namespace pared
