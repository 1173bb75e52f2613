// 4-bit weights with a scale for each group of the reduction: w[n][k] ~ scale[n][k / group] * q[n][k].
//
// Invariants (validate_int4 checks them all; view_int4 the header, on each call):
//   group: 32, 64 or 128, at kInt4GroupAt; the reduction is padded to whole groups;
//   weights (values_at): [panels of 16 outputs][groups] x { 16 float32 scales; group / 8 vectors of 64 bytes
//   }, read once and in order; byte 4 j + i of vector v: q + 8 of output j at 8 v + i in the low four bits,
//   at 8 v + 4 + i in the high ones; q from -8 to 7, 0 beyond the matrix; scales finite, not negative, 0
//   beyond the matrix.
// Size: half a byte an element and four bytes a group: 4.25 to 5 bits.
#pragma once

#include <cstdint>

#include "formats/csr.h"
#include "formats/packed.h"
#include "kernels/types.h"

namespace pared {

inline constexpr int64_t kInt4MaxCols = 1 << 20;
inline constexpr size_t kInt4GroupAt = 128;

struct Int4Packed {
  const PackedHeader* header;
  int32_t group;
  const uint8_t* weights;

  int64_t panels() const { return (header->rows + kInt8Panel - 1) / kInt8Panel; }
  int64_t groups() const { return (header->cols + group - 1) / group; }
  int32_t pairs() const { return group / (2 * kInt8Unit); }
  int64_t group_bytes() const { return 64 * (1 + pairs()); }
  int64_t panel_bytes() const { return groups() * group_bytes(); }
};

// Integers of the caller's: q [rows, cols] from -8 to 7, scales [rows, groups], both contiguous.
struct Int4View {
  const int8_t* q;
  const float* scales;
  int64_t rows, cols;
  DType dtype;
};

// Throw ValueError on sizes, groups, NaN and infinity, q or scales out of range.
PackedHeader plan_int4(int64_t rows, int64_t cols, DType dtype, int32_t group);
// Symmetric: scale = max|w| / 7 of the group, q = round(w / scale); a group below kSmallestMax is zero.
void pack_int4(const DenseView& w, int32_t group, PackedHeader header, uint8_t* out);
void pack_int4(const Int4View& w, int32_t group, PackedHeader header, uint8_t* out);

Int4Packed view_int4(const uint8_t* data, int64_t bytes);
void validate_int4(const Int4Packed& w);
// Both validate first.
void unpack_int4(const Int4Packed& w, int8_t* q, float* scales);  // [rows, cols], [rows, groups]
void unpack_int4_dense(const Int4Packed& w, DType dtype, void* out);

}  // namespace pared
