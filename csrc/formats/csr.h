// Sparse weights, packed for the panel kernels: an entry is one reduction unit of one row (CSR), or of four
// consecutive rows that share it ("quads": blocks of 4, 8, 16 ... rows, and dense weights).
//
// Invariants (validate_csr checks them all; checked cheaply, header only, on each call):
//   rows are cut into groups of kCsrGroup, a group into slots of entry_rows rows, the reduction into K blocks
//   of block_k units;
//   starts[g * (blocks + 1) + b]: first entry of group g in block b; block `blocks` is the group's end;
//   counts[(g * blocks + b) * slots + s]: entries of slot s; their sum is the next start minus this one;
//   values/offsets: group-major, then block, slot, ascending column; entry_rows values an entry, row by row;
//   offset = (column % block_k) * tile * 4, at most kMaxOffset, so that even a corrupt one stays inside the
//   panel buffer;
//   no denormal, infinity or NaN among the values; a zero only beside a non-zero of the same entry.
// Size: 2 bytes an entry and 4 a value (6 a non-zero for CSR, 4.5 for whole quads), one byte a slot and
// block, four bytes a group and block.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/packed.h"

namespace pared {

inline constexpr int kCsrGroup = 16;
inline constexpr int kQuadRows = 4;
inline constexpr uint32_t kMaxOffset = 0xffff;

struct CsrPacked {
  const PackedHeader* header;
  const uint32_t* starts;
  const uint8_t* counts;
  const float* values;
  const uint16_t* offsets;

  int slots() const { return kCsrGroup / header->entry_rows; }
  int64_t groups() const { return (header->rows + kCsrGroup - 1) / kCsrGroup; }
  int64_t blocks() const { return (header->cols + header->block_k - 1) / header->block_k; }
};

// The shape of a convolution weight behind the matrix; all zero for a linear one. A grouped convolution is a
// block-diagonal matrix: the rows of group g have non-zeros in columns [g, g + 1) * channels * kh * kw alone,
// so the kernels need to know nothing of groups.
struct ConvShape {
  int32_t channels = 0;  // of the input, in one group
  int32_t kh = 0, kw = 0, groups = 0;
};

// A dense weight [rows, cols] as the user holds it. Strides in elements. A convolution weight is given with
// its trailing axes flattened, which the binding does for contiguous memory; cols is then one group's.
struct DenseView {
  const void* data;
  DType dtype;  // f32, f16, bf16
  int64_t rows, cols, row_stride, col_stride;
  int64_t groups = 1;
};

// A CSR matrix in the interchange form (scipy, torch.sparse_csr): columns ascending and unique in each row.
struct CsrView {
  int64_t rows, cols;
  const void* row_ptr;  // rows + 1, of index_type
  const void* columns;  // nnz, of index_type
  DType index_type;     // i32 or i64
  const void* values;
  DType dtype;  // f32, f16, bf16
};

// Two steps, so that the caller owns the memory: plan (counts, checks, layout), then write.
struct CsrPlan {
  PackedHeader header;
  std::vector<uint32_t> starts;
  std::vector<uint8_t> counts;
};
// Throws ValueError on non-finite values, bad structure, or a matrix beyond the format's limits.
// entry_rows: 1, or 4 (kQuadRows).
CsrPlan plan_csr(const DenseView& w, const ConvShape& conv, PackedKind kind, int entry_rows);
CsrPlan plan_csr(const CsrView& w, const ConvShape& conv, PackedKind kind, int entry_rows);
void pack_csr(const DenseView& w, const CsrPlan& plan, uint8_t* out);
void pack_csr(const CsrView& w, const CsrPlan& plan, uint8_t* out);

// Reads the header; throws ValueError when the buffer is not a packed CSR of this version and size.
CsrPacked view_csr(const uint8_t* data, int64_t bytes);
// All invariants and the checksum; throws ValueError.
void validate_csr(const CsrPacked& w);

// Both validate first, and throw ValueError.
void unpack_csr(const CsrPacked& w, int64_t* row_ptr, int64_t* columns, float* values);
// [rows, cols] contiguous; for a convolution [rows, channels * kh * kw], the block diagonal folded back.
void unpack_csr_dense(const CsrPacked& w, DType dtype, void* out);
}  // namespace pared
