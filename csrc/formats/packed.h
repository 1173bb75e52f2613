// The header of every packed weight: one 64-byte aligned uint8 buffer that names its format, so that a
// buffer that is not one, or is of another version or shape, is refused with a clear error.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pared {

// csr, bsr and dense share the layout of formats/csr.h; the kind says what the user packed.
enum class PackedKind : uint16_t {
  csr = 1,
  bsr = 2,
  dense = 3,
  int8 = 4,
  bitmap = 5,
  bitmap8 = 6,
  bsr8 = 7,
  int4 = 8,
  pair = 9
};

struct PackedHeader {
  char magic[8];  // kPackedMagic
  PackedKind kind;
  uint16_t version;
  DType dtype;         // of the weight as the user gave it; how values are stored, the format says
  uint8_t entry_rows;  // output rows that share an offset: 1 or 4
  uint8_t reserved[2];
  uint64_t bytes;      // of the whole buffer
  int64_t rows, cols;  // weight as a matrix: outputs by reduction
  int64_t nnz;
  int64_t entries;  // stored (offset, entry_rows values); nnz when entry_rows is 1
  // A convolution's reduction is (channel, kh, kw) flattened; a linear weight has kh = kw = 0.
  int32_t channels, kh, kw, groups;
  uint32_t tile;                                         // floats between units of the panel
  uint32_t block_k;                                      // units in a K block
  uint64_t starts_at, counts_at, values_at, offsets_at;  // bytes from the header
  uint64_t checksum;  // of the header (this field zero) and everything behind
};
inline constexpr char kPackedMagic[8] = {'P', 'A', 'R', 'E', 'D', 'P', 'K', '1'};
inline constexpr uint16_t kPackedVersion = 2;
inline constexpr int64_t kMaxSize = int64_t{1} << 48;  // rows or columns: sums of a few products fit 64 bits

// A header with what every format fills the same way; sizes and sections are the format's.
PackedHeader new_header(PackedKind kind, DType dtype, int64_t rows, int64_t cols);
// The header of a buffer; throws ValueError when it is not a packed weight of this version and of `bytes`
// bytes, with float dtype and sizes in range. Cheap: for every call. What belongs to a kind, its view checks.
const PackedHeader& checked_header(const uint8_t* data, int64_t bytes);
// Throws ValueError unless the header's convolution shape is none (linear), or one of rows by cols.
void check_conv_shape(const PackedHeader& h);
// Throws ValueError unless the buffer holds `size` bytes, 64-byte aligned, at `at`.
void check_section(const PackedHeader& h, uint64_t at, uint64_t size);
// For the loops that read entries: throws ValueError unless those that a kernel is told to read are
// `inside` the buffer. A header that is right and bytes behind it that are not give this or wrong numbers.
void check_inside(bool inside);
// Writes the header, with the checksum, before contents that are complete.
void seal(const PackedHeader& h, uint8_t* out);
// Throws ValueError when the contents do not give the header's checksum.
void check_sum(const PackedHeader& h);

}  // namespace pared
