// int8 weights with zeros in blocks along the reduction, in the layout of formats/panel.h: a unit is four
// consecutive inputs, a value the 32-bit word of their four int8. Blocks of 1x4 are single rows, blocks of
// 4x4, 8x4, 16x4 quads. Weights are w = scale[row] * q; those of a convolution are read tap by tap, a tap's
// channels padded to a multiple of four.
//
// Beside the panel's sections, 64-byte aligned behind the header: scales, float32 [rows], finite and positive
// (or 0 for a row without weights); sums, int32 [rows], of the row's q: what the zero point of the
// activations adds to a product; an ActivationRange as formats/int8.h has it (dynamic: a scale a token, or an
// image). Size: 6 bytes a 1x4 block, 18 a 4x4 block.
#pragma once

#include <cstdint>
#include <vector>

#include "formats/int8.h"
#include "formats/panel.h"

namespace pared {

struct Bsr8Packed {
  PanelPacked<int32_t> panel;
  const float* scales;
  const int32_t* sums;
  const ActivationRange* activations;
};

struct Bsr8Plan {
  PanelPlan panel;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  ActivationRange activations;
};

// A weight of float type is quantised: scale = max |w| / 127 of the row, q = w / scale, rounded to the
// nearest even integer; a row whose magnitudes are all below 2^-100 is zero. One of int8 is taken as it is
// (-128 included), with the scales given, which are null otherwise; `dtype` is then what it unpacks to.
// entry_rows: 1, 4 (kQuadRows), or 0 for the one that multiplies faster. Throws ValueError on non-finite
// values or scales, or a matrix beyond the format's limits.
Bsr8Plan plan_bsr8(const DenseView& w, const ConvShape& conv, const float* scales, int entry_rows,
                   DType dtype = DType::f32, const ActivationRange& activations = {});
void pack_bsr8(const DenseView& w, const Bsr8Plan& plan, uint8_t* out);

// Reads the header; throws ValueError when the buffer is none of this format.
Bsr8Packed view_bsr8(const uint8_t* data, int64_t bytes);
// All invariants and the checksum; throws ValueError. So do the next two.
void validate_bsr8(const Bsr8Packed& w);

// float(q) * scale, [rows, dense_cols] contiguous.
void unpack_bsr8_dense(const Bsr8Packed& w, DType dtype, void* out);
// q, the same shape.
void unpack_bsr8_values(const Bsr8Packed& w, int8_t* out);

}  // namespace pared
