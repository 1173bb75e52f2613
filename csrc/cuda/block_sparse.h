// Products with block-sparse weights on tensor cores: blocks of 16, 32, 64 or 128 outputs by 16 bytes or more
// of columns, 16-bit or 8-bit values.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/launch_number.h"
#include "kernels/types.h"

namespace pared::cuda {

inline constexpr int kBlockSparseFewTokens = 16;  // rows of the smaller of the two tiles
inline constexpr int kBlockSparseManyTokens = 128;

constexpr int64_t block_sparse_tile(int64_t tokens) {
  return tokens <= kBlockSparseFewTokens ? kBlockSparseFewTokens : kBlockSparseManyTokens;
}

// What a block of threads does: blocks [begin, end) of a row of blocks, and, where the row has several items,
// to add up their sums in the order of the parts if it is the last to finish.
struct BlockItem {
  int32_t row, begin, end;
  int32_t part, parts;
  int32_t slot;  // of the row's first part in the workspace; rows of one part have none
};

struct BlockSparseWeight {
  const void* values;      // [blocks][block_rows][block_cols], 16-byte aligned, zeros beyond the matrix
  const int32_t* columns;  // [blocks], in blocks, ordered by row
  DType dtype;             // f16, bf16 or i8
  int32_t block_rows, block_cols;
  int64_t outputs, cols, blocks;
};

// y = activation(x W^T + bias); 8 bits: y = activation(float(sum) * x_scales[m] * w_scales[n] + bias[n]).
struct BlockSparseProduct {
  BlockSparseWeight w;
  const BlockItem* items;  // of all rows of blocks, those without a block included
  int64_t item_count, slots;
  const void* x;  // [tokens, cols] in w.dtype, rows at multiples of 16 bytes
  int64_t tokens, x_stride;
  const float *x_scales, *w_scales;  // i8 alone
  const float* bias;                 // or null
  Activation activation;
  DType dtype;  // of y: w.dtype, or any float type where that is i8
  void* y;
  int64_t y_stride;
  uint8_t* workspace;
};
// Bytes of the workspace; `counters` of them come first.
struct BlockSparseWorkspace {
  int64_t bytes, counters;
};
constexpr BlockSparseWorkspace block_sparse_workspace(int64_t tokens, int64_t slots, int block_rows) {
  const int64_t tile = block_sparse_tile(tokens), tiles = (tokens + tile - 1) / tile;
  const int64_t counters = (slots * tiles * kTicketBytes + 15) / 16 * 16;
  // A tile may have twice the rows where there are more tokens than one.
  const int64_t largest = tokens > tile ? 2 * tile : tile, rows = (tokens + largest - 1) / largest * largest;
  return {slots ? counters + slots * rows * block_rows * 4 : 0, counters};
}
void block_sparse_product(const BlockSparseProduct& a, int device, cudaStream_t stream);

// For tuning and tests: every later product runs on mma.sync (0) or on wgmma with tiles of 128 or 256 tokens
// where it can; -1: on what is thought fastest.
void force_block_sparse_kernel(int kernel);
bool block_sparse_wgmma(int device);  // whether this build and that device have the kernels for sm_90a

namespace wgmma {
// More than kBlockSparseFewTokens tokens, blocks of 64 or 128 outputs by a multiple of 128 bytes; `rows` of
// tokens a tile: 128 or 256.
void block_sparse(const BlockSparseProduct& a, int rows, cudaStream_t stream);
}  // namespace wgmma

}  // namespace pared::cuda
