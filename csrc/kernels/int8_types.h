// The signatures of the int8 kernels; included by kernels/types.h.
//
// One representation for every level: activations are unsigned bytes u = q + zero, weights signed bytes w,
// and a product is sum_k u w in int32, modulo 2^32. The caller subtracts zero * sum_k w ("compensation"). All
// results are the same bits at every level.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace pared {

enum class Activation : uint8_t;

inline constexpr int kInt8Panel =
    16;                              // outputs of a weight vector: 16 outputs by 4 of the reduction, 64 bytes
inline constexpr int kInt8Unit = 4;  // bytes of the reduction in a unit
inline constexpr int kGemmTokens = 6;   // tokens and panels of the largest tile: 24 accumulators, 4 weight
inline constexpr int kGemmPanels = 4;   // vectors and a broadcast fill AVX-512's 32 registers
inline constexpr int kGemmUnits = 192;  // of a call's reduction, at most, in all runs together

// Rows of activations to bytes. scale == 0: dynamic and symmetric, each row by its own largest magnitude,
// s = max|x| / 127, u = round(x * (127 / max|x|)) + 128, round to nearest even; a row whose largest magnitude
// is below kSmallestMax counts as zeros. Otherwise static: u = clamp(round(x / scale) + zero, low, high).
// scales[r] is s or `scale`; NaN for a row that holds a NaN or an infinity, so that its output is NaN.
inline constexpr float kSmallestMax = 7.888609052210118e-31f;  // 2^-100: 127 / max must not overflow
struct QuantizeArgs {
  const void* x;
  int64_t x_stride;  // elements between rows
  DType dtype;       // f32, f16 or bf16
  int32_t rows, cols;
  float scale;
  int32_t zero, low, high;
  uint8_t* out;
  int64_t out_stride;  // bytes, at least cols rounded up to kInt8Unit, which is filled with zero bytes
  float* scales;       // [rows]
};
struct quantize_u8 {
  using Fn = void(const QuantizeArgs&);
  static constexpr const char* doc = "activations to 8 bits, dynamically by row or with a given scale";
};

// The largest magnitude of `count` elements, as the bits of a float32: NaN above infinity above all others.
struct MagnitudeArgs {
  const void* x;
  DType dtype;  // f32, f16 or bf16
  int64_t count;
  uint32_t* largest;  // written
};
struct largest_magnitude {
  using Fn = void(const MagnitudeArgs&);
  static constexpr const char* doc = "largest magnitude of a run of activations";
};

// Channel planes to words of four channels' bytes: out[c / 4][m], byte c % 4 = clamp(round(x[c][m] / scale) +
// zero, low, high); zero bytes for channels beyond the last. Whole vectors of 16 words are written.
struct QuantizePlanesArgs {
  const void* x;           // first channel, first position
  int64_t channel_stride;  // elements
  DType dtype;             // f32, f16 or bf16
  int32_t channels, count;
  int64_t readable;  // elements that may be read from a channel's first position on; at least `count`
  float scale;
  int32_t zero, low, high;
  uint32_t* out;
  int64_t out_stride;  // words between units, at least `count` rounded up to 16
  uint32_t* largest;   // written: as MagnitudeArgs has it, over what was read
};
struct quantize_planes {
  using Fn = void(const QuantizePlanesArgs&);
  static constexpr const char* doc = "channel planes to words of four channels, 8 bits each";
};

// acc[m][16 v + j] (+)= sum over units of x[m] . w[v][unit][j], for the tokens and panels of the table's
// entry. A token's units may lie in several runs of equal length: run r at x + m * x_stride + run_at[r].
constexpr int64_t kOneRun[] = {0};
// What the products bring nearer on their way, for a call to come: with each unit one line of each of
// `panels` panels (none, one or as many as the tile has), `step` bytes behind the last.
struct GemmAhead {
  const int8_t* at = nullptr;
  int64_t stride = 0;  // bytes between panels
  int32_t step = 0, panels = 0;
};
struct GemmArgs {
  const uint8_t* x;  // [tokens][x_stride]
  int64_t x_stride;
  const int8_t* w;   // [panels][w_stride]: [runs][units][16][4], 64-byte aligned
  int64_t w_stride;  // bytes between panels
  int32_t units;     // of a run; in all runs together at most kGemmUnits
  int32_t* acc;      // 64-byte aligned
  int64_t acc_stride;
  bool accumulate;  // false: acc is written, not read
  int32_t runs = 1;
  const int64_t* run_at = kOneRun;  // [runs], bytes
  GemmAhead ahead = {};
};
struct gemm_u8s8 {
  // One function for each tile: index (tokens - 1) * kGemmPanels + panels - 1.
  using Fn = void(const GemmArgs&);
  using Table = Fn* const[kGemmTokens * kGemmPanels];
  static constexpr const char* doc = "unsigned bytes times packed signed bytes, int32 sums";
};

// y[m][n] = activation(float(acc[m][n] - compensation[n]) * x_scales[m] * w_scales[n] + bias[n]), rounded
// after each operation, in this order.
struct DequantizeArgs {
  const int32_t* acc;
  int64_t acc_stride;
  const int32_t* compensation;  // padded to whole panels, as w_scales is
  const float* x_scales;        // [tokens]
  const float* w_scales;
  int32_t tokens, outputs;
  const float* bias;  // [outputs], or null
  Activation activation;
  void* y;
  int64_t y_stride;      // elements between tokens
  DType dtype;           // f32, f16 or bf16
  int64_t residual = 0;  // as in PanelStoreArgs
};
struct dequantize_store {
  using Fn = void(const DequantizeArgs&);
  static constexpr const char* doc = "int32 sums to scaled outputs with bias and activation";
};

// Sixteen filters at most by `vectors` (of the table's entry) times 16 neighbouring output positions of an
// image that lies as words of four channels, plane by plane: y[f][m] = float(sum over taps and units of
// x[taps_at[tap] + unit * unit_stride + m] . w[tap][unit][f] - compensation[f]) * x_scale * w_scales[f],
// rounded after each operation, in this order.
inline constexpr int kConvPlaneVectors = 6;
struct ConvPlanesArgs {
  const uint32_t* x;  // where offsets count from for the tile's first position
  const int64_t* taps_at;
  int32_t taps, units;  // units of each tap
  int64_t unit_stride;  // words
  const int8_t* w;      // one panel: [taps][units][16][4]
  int32_t filters;      // 1..16: up to the next multiple of 16 are written
  const int32_t* compensation;
  const float* w_scales;
  float x_scale;
  float* y;          // 64-byte aligned
  int64_t y_stride;  // elements between filters, a multiple of 16
  // What is fetched during the products: for each filter the bytes that the caller stores the outputs to.
  const void* ahead;
  int64_t ahead_stride, ahead_bytes;
};
struct conv_planes_u8s8 {
  // One function for each number of vectors, at index vectors - 1.
  using Fn = void(const ConvPlanesArgs&);
  using Table = Fn* const[kConvPlaneVectors];
  static constexpr const char* doc = "packed signed bytes times channel planes of unsigned bytes, scaled";
};

// y[m][j] = activation((sum over groups of float(sum of x n - sums[m][g]) * scale[g][j]) * x_scales[m] +
// bias[j]) for one panel of 16 outputs, with nibbles n = q + 8 and sums[m][g] = 8 * sum of x over the group,
// rounded after each operation, groups in order. Layout of w: formats/int4.h.
struct Int4Args {
  const int8_t* x;
  int64_t x_stride;
  const int32_t* sums;    // [tokens][groups]
  const float* x_scales;  // [tokens]
  int32_t tokens;
  const uint8_t* w;  // the first panel, 64-byte aligned; the others are w_stride bytes apart
  int64_t w_stride;
  int32_t groups, pairs;  // pairs of units in a group
  int32_t outputs;        // at least 1, 16 a panel
  const float* bias;      // [outputs], or null
  Activation activation;
  void* y;
  int64_t y_stride;
  DType dtype;
};
struct gemm_s8u4 {
  using Fn = void(const Int4Args&);
  static constexpr const char* doc = "signed bytes times packed nibbles with group scales";
};

}  // namespace pared
