// Unstructured weights for few tokens: a vector holds 16 consecutive outputs at `depth` consecutive inputs,
// stored as a mask of 16 * depth bits and its non-zero elements alone. The kernel expands a vector in a
// register and uses it for every token. A weight is read once, front to back: that is the cost here.
//
// Outputs come in groups of 16, groups in passes of kBitmapPass, inputs in vectors, vectors in K blocks of
// block_k. The order is pass, K block, group, vector: what a thread reads of one K block of the activations
// (which stay in L1) is contiguous. A (K block, group) pair is a cell.
//
// Invariants (validate_bitmap checks them all; the header is checked on each call):
//   bit o * depth + d of a vector's mask: element (16 * group + o, depth * vector + d) is stored;
//   values: the stored elements, vector after vector, by ascending bit;
//   starts[cell]: first value of the cell, in the order above; the last entry is nnz;
//   the vectors of a row of cells are rounded up to a multiple of 4; bits outside the matrix are clear;
//   no zero, denormal, infinity or NaN among the values; kBitmapSlack readable bytes behind them.
// Float32 and float16 weights are stored as float32 in vectors of depth 1, bfloat16 ones as they are in
// vectors of depth 2: pairs of inputs, which become two registers of float32 by a shift and a mask.
// Size: 4 bytes a non-zero, 2 of bfloat16, and one bit an element.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "formats/csr.h"
#include "formats/packed.h"

namespace pared {

inline constexpr int kBitmapLanes = 16;      // outputs of a vector
inline constexpr int kBitmapPass = 32;       // groups whose sums stay in L2 while their K blocks go by
inline constexpr int kBitmapBlock = 512;     // inputs of a K block: 16 tokens of it are 32 KB
inline constexpr int64_t kBitmapSlack = 64;  // a kernel loads whole vectors of values
inline constexpr int64_t kBitmapMaxNonZeros = int64_t{1} << 32;  // starts are 32 bits

// Where things are, from the header's sizes alone.
struct BitmapShape {
  int64_t rows, cols;
  int depth;
  int64_t block_k;

  int64_t groups() const { return (rows + kBitmapLanes - 1) / kBitmapLanes; }
  int64_t vectors() const { return (cols + 4 * depth - 1) / (4 * depth) * 4; }
  int64_t blocks() const { return (vectors() + block_k - 1) / block_k; }
  int64_t vectors_in(int64_t block) const { return std::min(block_k, vectors() - block * block_k); }
  // Groups of the pass that begins with group `first`.
  int64_t groups_in(int64_t first) const { return std::min<int64_t>(kBitmapPass, groups() - first); }
  int64_t cell(int64_t group, int64_t block) const {
    const int64_t first = group / kBitmapPass * kBitmapPass;
    return first * blocks() + block * groups_in(first) + (group - first);
  }
  int64_t first_vector(int64_t group, int64_t block) const {
    const int64_t first = group / kBitmapPass * kBitmapPass;
    return first * vectors() + block * block_k * groups_in(first) + (group - first) * vectors_in(block);
  }
};

struct BitmapPacked {
  const PackedHeader* header;
  const uint32_t* starts;
  const uint8_t* masks;   // 2 * depth bytes a vector
  const uint8_t* values;  // of type bitmap_values(header->dtype)

  BitmapShape shape() const;
};

// How the values of a weight of that type are stored.
inline DType bitmap_values(DType weight) { return weight == DType::bf16 ? DType::bf16 : DType::f32; }
inline int bitmap_depth(DType weight) { return weight == DType::bf16 ? 2 : 1; }
inline BitmapShape bitmap_shape(const PackedHeader& h) {
  return {h.rows, h.cols, bitmap_depth(h.dtype), h.block_k};
}
inline BitmapShape BitmapPacked::shape() const { return bitmap_shape(*header); }

// Two steps, so that the caller owns the memory: plan (counts, checks, layout), then write.
struct BitmapPlan {
  PackedHeader header;
  std::vector<uint32_t> starts;
  std::vector<uint8_t> masks;
};
// Throws ValueError on non-finite values, or a matrix beyond the format's limits.
BitmapPlan plan_bitmap(const DenseView& w);
void pack_bitmap(const DenseView& w, const BitmapPlan& plan, uint8_t* out);

// Reads the header; throws ValueError when the buffer is not a bitmap weight of this version and size.
BitmapPacked view_bitmap(const uint8_t* data, int64_t bytes);
// All invariants and the checksum; throws ValueError.
void validate_bitmap(const BitmapPacked& w);
// [rows, cols], contiguous, of f32, f16 or bf16. Validates first.
void unpack_bitmap_dense(const BitmapPacked& w, DType dtype, void* out);

}  // namespace pared
