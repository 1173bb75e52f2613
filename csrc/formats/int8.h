// Dense int8 weights for u8 x s8 products: w[n][k] ~ scale[n] * q[n][k].
//
// Invariants (validate_int8 checks them all; view_int8 the header, on each call):
//   behind the PackedHeader, at kInt8TailAt, an Int8Tail;
//   weights (values_at): [panels][units][16 outputs][4 of the reduction] bytes, panels and units rounded up,
//   what is beyond the matrix zero; a convolution's units go tap by tap, the channels of a tap padded to
//   whole ones, and the outputs of each of its groups to whole panels;
//   scales: float32, one an output, padded to whole panels with zeros; finite, not negative;
//   compensation: int32, zero * sum over k of q[n][k], padded likewise;
//   activations: scale 0 is dynamic by row with zero 128, low 1, high 255; else static, positive and normal,
//   0 <= low <= zero <= high <= 255.
// Limit: at most kInt8MaxCols elements a row, so that sum |u - zero| |q| <= cols * 255 * 128 stays below
// 2^31. Size: one byte an element and 8 an output.
#pragma once

#include <cstdint>

#include "formats/csr.h"
#include "formats/packed.h"
#include "kernels/types.h"

namespace pared {

inline constexpr int64_t kInt8MaxCols = 65793;

// How a layer's input becomes bytes: u = clamp(round(x / scale) + zero, low, high).
struct ActivationRange {
  float scale = 0.0f;  // 0: dynamic
  int32_t zero = 128, low = 1, high = 255;
};

// Throws ValueError unless the invariants above hold.
bool operator==(const ActivationRange& a, const ActivationRange& b);
void check_activations(const ActivationRange& activations, const char* of = "");

// How a row's elements, in the order of the user's weight, lie in units of four: a convolution's tap by tap,
// the channels of a tap padded to whole units.
struct Int8Words {
  int64_t taps, channels, groups;  // a linear weight has one tap
  int64_t per_tap() const { return (channels + kInt8Unit - 1) / kInt8Unit; }
  int64_t per_row() const { return taps * per_tap(); }  // units of one row
  int64_t units() const { return groups * per_row(); }  // of the block-diagonal matrix
  // Byte of element c of a row.
  int64_t byte(int64_t c) const { return taps == 1 ? c : (c % taps) * per_tap() * kInt8Unit + c / taps; }
};
Int8Words int8_words(const PackedHeader& h);

struct Int8Tail {
  uint64_t scales_at, compensation_at;
  ActivationRange activations;
};
inline constexpr size_t kInt8TailAt = 128;

struct Int8Packed {
  const PackedHeader* header;
  const ActivationRange* activations;
  const int8_t* weights;
  const float* scales;
  const int32_t* compensation;

  int64_t groups() const { return header->kh ? header->groups : 1; }
  int64_t group_rows() const { return header->rows / groups(); }
  int64_t group_panels() const { return (group_rows() + kInt8Panel - 1) / kInt8Panel; }
  int64_t panels() const { return groups() * group_panels(); }
  int64_t units() const { return int8_words(*header).per_row(); }
  int64_t panel_bytes() const { return units() * kInt8Panel * kInt8Unit; }
};

// A weight to pack: int8 with its scales [rows]; without scales any floats, which are rounded by output:
// scale = max|w| / 127, q = round(w / scale). A row whose largest magnitude is below kSmallestMax is zero.
struct Int8Source {
  DenseView values;
  const float* scales = nullptr;
};

// Sizes and checks: throws ValueError. to_dense gives `dtype` back.
PackedHeader plan_int8(const Int8Source& w, const ConvShape& conv, DType dtype,
                       const ActivationRange& activations);
// Throws ValueError on NaN and infinity.
void pack_int8(const Int8Source& w, const ActivationRange& activations, PackedHeader header, uint8_t* out);
// One panel of it, with the scales and the compensation of its outputs: what pack_int8 would write there, for
// a format that stores its bytes in another way. Returns the non-zeros; throws as pack_int8.
int64_t quantize_panel(const Int8Source& w, const PackedHeader& header, const ActivationRange& activations,
                       int64_t panel, int8_t* bytes, float* scales, int32_t* compensation);

Int8Packed view_int8(const uint8_t* data, int64_t bytes);
void validate_int8(const Int8Packed& w);
// Both validate first.
void unpack_int8(const Int8Packed& w, int8_t* q, float* scales);  // [rows, dense_cols], [rows]
void unpack_int8_dense(const Int8Packed& w, DType dtype, void* out);

}  // namespace pared
