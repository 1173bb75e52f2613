#include "formats/formats.h"

#include "core/check.h"
#include "formats/bitmap.h"
#include "formats/bitmap8.h"
#include "formats/bsr8.h"
#include "formats/csr.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/pair.h"

namespace pared {
namespace {

void check_panel(const uint8_t* data, int64_t bytes) { view_csr(data, bytes); }
void validate_panel(const uint8_t* data, int64_t bytes) { validate_csr(view_csr(data, bytes)); }
void unpack_panel(const uint8_t* data, int64_t bytes, DType dtype, void* out) {
  unpack_csr_dense(view_csr(data, bytes), dtype, out);
}

void check_bitmap(const uint8_t* data, int64_t bytes) { view_bitmap(data, bytes); }
void validate_bitmap_bytes(const uint8_t* data, int64_t bytes) { validate_bitmap(view_bitmap(data, bytes)); }
void unpack_bitmap(const uint8_t* data, int64_t bytes, DType dtype, void* out) {
  unpack_bitmap_dense(view_bitmap(data, bytes), dtype, out);
}

void check_int8(const uint8_t* data, int64_t bytes) { view_int8(data, bytes); }
void validate_int8_bytes(const uint8_t* data, int64_t bytes) { validate_int8(view_int8(data, bytes)); }
void unpack_int8(const uint8_t* data, int64_t bytes, DType dtype, void* out) {
  unpack_int8_dense(view_int8(data, bytes), dtype, out);
}

void check_bitmap8(const uint8_t* data, int64_t bytes) { view_bitmap8(data, bytes); }
void validate_bitmap8_bytes(const uint8_t* data, int64_t bytes) {
  validate_bitmap8(view_bitmap8(data, bytes));
}
void unpack_bitmap8(const uint8_t* data, int64_t bytes, DType dtype, void* out) {
  unpack_bitmap8_dense(view_bitmap8(data, bytes), dtype, out);
}

void check_pair(const uint8_t* data, int64_t bytes) { view_pair(data, bytes); }
void validate_pair_bytes(const uint8_t* data, int64_t bytes) { validate_pair(view_pair(data, bytes)); }
void unpack_pair(const uint8_t* data, int64_t bytes, DType dtype, void* out) {
  const PairPacked w = view_pair(data, bytes);
  validate_pair(w);
  unpack_bitmap_dense(w.few, dtype, out);
}

void check_blocks8(const uint8_t* data, int64_t bytes) { view_bsr8(data, bytes); }
void validate_blocks8(const uint8_t* data, int64_t bytes) { validate_bsr8(view_bsr8(data, bytes)); }
void unpack_blocks8(const uint8_t* data, int64_t bytes, DType dtype, void* out) {
  unpack_bsr8_dense(view_bsr8(data, bytes), dtype, out);
}

void check_int4(const uint8_t* data, int64_t bytes) { view_int4(data, bytes); }
void validate_int4_bytes(const uint8_t* data, int64_t bytes) { validate_int4(view_int4(data, bytes)); }
void unpack_int4(const uint8_t* data, int64_t bytes, DType dtype, void* out) {
  unpack_int4_dense(view_int4(data, bytes), dtype, out);
}

constexpr PackedFormat kFormats[] = {
    {PackedKind::csr, "csr", check_panel, validate_panel, unpack_panel},
    {PackedKind::bsr, "bsr", check_panel, validate_panel, unpack_panel},
    {PackedKind::dense, "dense", check_panel, validate_panel, unpack_panel},
    {PackedKind::bitmap, "bitmap", check_bitmap, validate_bitmap_bytes, unpack_bitmap},
    {PackedKind::int8, "int8", check_int8, validate_int8_bytes, unpack_int8},
    {PackedKind::bitmap8, "bitmap8", check_bitmap8, validate_bitmap8_bytes, unpack_bitmap8},
    {PackedKind::pair, "bitmap+csr", check_pair, validate_pair_bytes, unpack_pair},
    {PackedKind::int4, "int4", check_int4, validate_int4_bytes, unpack_int4},
    {PackedKind::bsr8, "bsr8", check_blocks8, validate_blocks8, unpack_blocks8},
};

}  // namespace

const PackedFormat& format_of(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  for (const PackedFormat& f : kFormats)
    if (f.kind == h.kind) return f;
  throw ValueError(str("packed weight: expected a known format, got kind ", static_cast<int>(h.kind)));
}

int64_t dense_cols(const PackedHeader& h) {
  return h.kh ? static_cast<int64_t>(h.channels) * h.kh * h.kw : h.cols;
}

}  // namespace pared
