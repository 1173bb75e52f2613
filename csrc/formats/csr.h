// CSR weights, packed for the panel kernels.
//
// Invariants (validate_csr checks them all; checked cheaply, header only, on each call):
//   rows are cut into groups of kCsrGroup, the reduction into K blocks of block_k units;
//   starts[g * (blocks + 1) + b]: first non-zero of group g in block b; block `blocks` is the group's end;
//   counts[(g * blocks + b) * kCsrGroup + r]: non-zeros of row r; their sum is the next start minus this one;
//   values/offsets: group-major, then block, row, ascending column; offset = (column % block_k) * tile * 4,
//   at most kMaxOffset, so that even a corrupt one stays inside the panel buffer;
//   no explicit zero, denormal, infinity or NaN among the values.
// Size: 6 bytes a non-zero, one byte a row and block, four bytes a group and block.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/packed.h"

namespace pared {

inline constexpr int kCsrGroup = 16;
inline constexpr uint32_t kMaxOffset = 0xffff;

struct CsrPacked {
  const PackedHeader* header;
  const uint32_t* starts;
  const uint8_t* counts;
  const float* values;
  const uint16_t* offsets;

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
CsrPlan plan_csr(const DenseView& w, const ConvShape& conv);
CsrPlan plan_csr(const CsrView& w, const ConvShape& conv);
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
// Columns of the weight as the user knows it.
int64_t dense_cols(const PackedHeader& h);

}  // namespace pared
