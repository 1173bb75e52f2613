// Unstructured int8 weights: the dense int8 layout (formats/int8.h: vectors of 16 outputs by 4 inputs, one
// 64-byte register) with the masks and the order of formats/bitmap.h (depth 4). Quantized as a dense int8
// weight is: the two formats hold the same numbers, and turn into each other without a second rounding.
//
// Invariants (validate_bitmap8 checks them all; the header is checked on each call): those of
// formats/bitmap.h with bytes for values, none of them zero; an Int8Tail at kInt8TailAt, scales and
// compensation as in formats/int8.h. Size: a byte a non-zero, a bit an element, 8 bytes an output.
#pragma once

#include <cstdint>

#include "formats/bitmap.h"
#include "formats/int8.h"

namespace pared {

// Vectors of a K block: four groups of them expand to 32 KB, which stay in L1 while all tokens pass.
inline constexpr int kBitmap8Block = 128;

struct Bitmap8Packed {
  const PackedHeader* header;
  const ActivationRange* activations;
  const uint32_t* starts;
  const uint64_t* masks;
  const int8_t* values;
  const float* scales;
  const int32_t* compensation;

  BitmapShape shape() const { return {header->rows, header->cols, kInt8Unit, kBitmap8Block}; }
};

struct Bitmap8Plan {
  PackedHeader header;
  PackedHeader dense;  // of plan_int8
  ActivationRange activations;
  uint64_t scales_at, compensation_at;
  std::vector<uint32_t> starts;
};
// Sizes, from the weight and the plan of the dense format; throws ValueError on NaN and infinity and beyond
// the format's limits. The weight is rounded here and again where it is packed, a panel at a time: all of it
// in 8 bits would be a quarter of it beside.
Bitmap8Plan plan_bitmap8(const Int8Source& w, const PackedHeader& dense, const ActivationRange& activations);
void pack_bitmap8(const Int8Source& w, const Bitmap8Plan& plan, uint8_t* out);

Bitmap8Packed view_bitmap8(const uint8_t* data, int64_t bytes);
void validate_bitmap8(const Bitmap8Packed& w);
// Both validate first.
void unpack_bitmap8(const Bitmap8Packed& w, int8_t* q, float* scales);  // [rows, cols], [rows]
void unpack_bitmap8_dense(const Bitmap8Packed& w, DType dtype, void* out);

}  // namespace pared
