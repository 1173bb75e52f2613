// Float32 weights in the layout of formats/panel.h, a unit a column: sparse rows (CSR), or quads of rows
// (blocks of 4, 8, 16 ... rows, and dense weights). No value is a denormal, an infinity or a NaN.
// Size: 6 bytes a non-zero for CSR, 4.5 for whole quads.
#pragma once

#include <cstdint>

#include "formats/panel.h"

namespace pared {

using CsrPacked = PanelPacked<float>;

// A CSR matrix in the interchange form (scipy, torch.sparse_csr): columns ascending and unique in each row.
struct CsrView {
  int64_t rows, cols;
  const void* row_ptr;  // rows + 1, of index_type
  const void* columns;  // nnz, of index_type
  DType index_type;     // i32 or i64
  const void* values;
  DType dtype;  // f32, f16, bf16
};

// Throws ValueError on non-finite values, bad structure, or a matrix beyond the format's limits.
// entry_rows: 1, or 4 (kQuadRows).
PanelPlan plan_csr(const DenseView& w, const ConvShape& conv, PackedKind kind, int entry_rows);
PanelPlan plan_csr(const CsrView& w, const ConvShape& conv, PackedKind kind, int entry_rows);
void pack_csr(const DenseView& w, const PanelPlan& plan, uint8_t* out);
void pack_csr(const CsrView& w, const PanelPlan& plan, uint8_t* out);

// Reads the header; throws ValueError when the buffer is not a packed CSR of this version and size.
CsrPacked view_csr(const uint8_t* data, int64_t bytes);
// All invariants and the checksum; throws ValueError.
void validate_csr(const CsrPacked& w);

// Both validate first, and throw ValueError.
void unpack_csr(const CsrPacked& w, int64_t* row_ptr, int64_t* columns, float* values);
// [rows, cols] contiguous; for a convolution [rows, channels * kh * kw], the block diagonal folded back.
void unpack_csr_dense(const CsrPacked& w, DType dtype, void* out);
}  // namespace pared
