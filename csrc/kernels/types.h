// The signature of every kernel, by op. A kernel translation unit includes this and the generic template it
// instantiates, and no standard header that defines functions: what is inlined under AVX-512 flags must not
// be emitted as a weak symbol that the linker could pick for the scalar path.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/dtype.h"
#include "kernels/int8_types.h"
#include "kernels/select_types.h"

namespace pared {

// Activation fused into an epilogue. gelu is the erf form, gelu_tanh the tanh approximation.
enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu };

// A panel is activations with the reduction axis outermost: panel[u * stride + m], u a unit of the
// reduction, m an output position (token or pixel). A kernel works on `vectors` groups of 16 positions.
inline constexpr int kPanelGroup = 16;     // positions a group; one AVX-512 register of float32
inline constexpr int kPanelMaxGroups = 8;  // 128 positions: 8 AVX-512 accumulators, 40 KB for 80 units

// What a row of a row group, or a quad of rows, has in a K block.
struct PanelRun {
  uint8_t count;  // entries
  uint8_t slot;   // the row or quad, counted from the group's first
};
inline constexpr int kPanelMaxSlots = 16;  // a power of two

// Rows of a sparse weight against one K block of the panel: acc[slot][m] (+)= sum_i values[i] * panel at
// offsets[i]. One call covers a few rows (a row group) so that it stays in the instruction stream; the
// epilogue runs between calls while acc is in L1. Runs of equal length that follow each other end where the
// processor expects it.
template <class T>
struct PanelArgs {
  const PanelRun* runs;     // one a row
  const T* values;          // runs back to back
  const uint16_t* offsets;  // of the units' first positions in the panel, bytes before `scale`
  const T* panel;           // 64-byte aligned
  T* acc;                   // [kPanelMaxSlots][vectors * 16], 64-byte aligned
  int32_t rows;
  bool accumulate;  // false: acc is written, not read
  // 2^16 times the distance of two units in the panel over the one that the offsets say: 2^16 where they are
  // the panel's own.
  uint64_t scale;
  // From these entries to those that come next, bytes: read ahead in step with the work, where they lie
  // elsewhere in memory. They need not be mapped.
  uintptr_t values_ahead = 0, offsets_ahead = 0;
  // Positions at the tile's end, fewer than a group, whose sums may be left as they are.
  int32_t spare = 0;
};
using CsrPanelArgs = PanelArgs<float>;
struct csr_panel_f32 {
  // One function for each number of vectors, 1..kPanelMaxGroups, at index vectors - 1.
  using Fn = void(const CsrPanelArgs&);
  using Table = Fn* const[kPanelMaxGroups];
  static constexpr const char* doc = "sparse rows times an activation panel, float32";
};

// The same with four output rows an entry: they share the offset, and a loaded vector serves four
// multiply-adds. `runs` and `rows` are of such quads, `values` holds four an entry, acc has 4 rows a slot.
struct quad_panel_f32 {
  using Fn = void(const CsrPanelArgs&);
  using Table = Fn* const[kPanelMaxGroups];
  static constexpr const char* doc = "quads of rows with shared columns times an activation panel, float32";
};

// The same two with int8 weights: a unit of the reduction is a 32-bit word of four consecutive elements,
// uint8 in the panel, int8 among the values, and a product is the sum of their four products, exact in int32:
// bytes may have any value (no saturation in between), sums up to 65793 elements (kInt8MaxCols) cannot
// overflow.
using WordPanelArgs = PanelArgs<int32_t>;
struct csr_panel_s8 {
  using Fn = void(const WordPanelArgs&);
  using Table = Fn* const[kPanelMaxGroups];
  static constexpr const char* doc = "sparse rows of 1x4 blocks times an activation panel, int8";
};
struct quad_panel_s8 {
  using Fn = void(const WordPanelArgs&);
  using Table = Fn* const[kPanelMaxGroups];
  static constexpr const char* doc = "sparse quads of 4x4 blocks times an activation panel, int8";
};

// In place, int32 to float32: acc[r][m] = float(acc - offset * row_sums[r]) * (row_scales[r] *
// position_scales[m]).
struct PanelDequantizeArgs {
  int32_t* acc;  // [rows][acc_stride], 64-byte aligned
  int32_t acc_stride, rows;
  int32_t positions;  // a multiple of kPanelGroup
  int32_t offset;     // what quantisation added to the activations: their zero point
  const int32_t* row_sums;
  const float* row_scales;
  const float* position_scales;  // [positions], 64-byte aligned
};
struct panel_dequantize {
  using Fn = void(const PanelDequantizeArgs&);
  static constexpr const char* doc = "zero-point correction and scales of an int32 tile";
};

// Transposes x[positions][units] (row-major, any of the float types) into panel[units][stride].
struct PanelPackArgs {
  const void* x;      // first position, first unit
  int64_t x_stride;   // elements between positions
  DType dtype;        // f32, f16 or bf16: widened to float32
  int32_t positions;  // real positions; the rest up to vectors * 16 are written as zero
  int32_t vectors;
  int32_t units;
  int32_t stride;  // floats between units of the panel
  float* panel;
};
struct panel_pack {
  using Fn = void(const PanelPackArgs&);
  static constexpr const char* doc = "transpose and widen activations into a panel";
};

// Epilogue: y[position][row] = activation(acc[row][position] + bias[row]).
struct PanelStoreArgs {
  const float* acc;  // [rows, to a multiple of 16][acc_stride]
  int32_t acc_stride;
  int32_t rows;
  int32_t positions;
  const float* bias;  // [rows], or null
  Activation activation;
  void* y;               // first position, first row
  int64_t y_stride;      // elements between positions
  DType dtype;           // f32, f16 or bf16: rounded to nearest even
  int64_t residual = 0;  // bytes from y to what is added before the activation, in y's layout; 0: nothing
};
struct panel_store {
  using Fn = void(const PanelStoreArgs&);
  static constexpr const char* doc = "bias, activation, transpose and narrow into the output";
};

// Few tokens against a weight of masks and packed values (formats/bitmap.h): 16 outputs a vector, each vector
// expanded once and used for every token. One call covers consecutive groups of one K block.
inline constexpr int kBitmapMaxTokens = 16;
// Floats between the tokens of `x`: a K block, and a line more so that tokens do not share cache sets.
inline constexpr int kBitmapStride = 512 + 16;
template <class Mask, class Value>
struct BitmapArgs {
  const Mask* masks;    // [groups][vectors]
  const Value* values;  // the non-zeros of all of them
  const Value* end;     // of the non-zeros in the buffer, and 64 readable bytes
  const float* x;       // [tokens][kBitmapStride], zero up to the inputs of `vectors`
  float* acc;           // [groups][tokens][16], 64-byte aligned
  int32_t groups;
  int32_t vectors;  // of a group; a multiple of 4
  bool accumulate;  // false: acc is written, not read
};
struct bitmap_f32 {
  // One function for each number of tokens, 1..kBitmapMaxTokens, at index tokens - 1. False, as of the other
  // kernels that read masks: the masks ask for more than there is up to `end`, and nothing beyond was read.
  using Fn = bool(const BitmapArgs<uint16_t, float>&);
  using Table = Fn* const[kBitmapMaxTokens];
  static constexpr const char* doc = "masked weights, expanded in registers, times few tokens, float32";
};

// The same with bfloat16 non-zeros, whose vectors hold 16 outputs at two inputs: an expansion serves twice as
// many multiply-adds. The results are bitmap_f32's, bit for bit.
struct bitmap_bf16 {
  using Fn = bool(const BitmapArgs<uint32_t, uint16_t>&);
  using Table = Fn* const[kBitmapMaxTokens];
  static constexpr const char* doc = "masked bfloat16 weights, expanded in registers, times few tokens";
};

// Masked bytes (formats/bitmap8.h) of consecutive groups of one K block to the layout of the dense int8
// kernel.
struct BitmapExpandArgs {
  const uint64_t* masks;  // [groups][vectors]
  const int8_t* values;   // the non-zeros of all of them
  const int8_t* end;      // of the non-zeros in the buffer, and 64 readable bytes
  int8_t* out;            // [groups][vectors][64], 64-byte aligned
  int32_t groups, vectors;
};
struct bitmap_expand {
  using Fn = bool(const BitmapExpandArgs&);
  static constexpr const char* doc = "masked int8 weights to a dense tile";
};

// The int8 counterpart of bitmap_f32: expanded in registers and multiplied as gemm_u8s8 does. Entries for
// more tokens than pay at a level are null: bitmap_expand and gemm_u8s8 do it in two steps.
inline constexpr int kBitmap8Stride = 4 * 128 + 64;  // bytes between the tokens of `x`
struct Bitmap8Args {
  const uint64_t* masks;
  const int8_t* values;
  const int8_t* end;  // as of BitmapExpandArgs
  const uint8_t* x;   // [tokens][kBitmap8Stride]
  int32_t* acc;       // [groups][tokens][16], 64-byte aligned
  int32_t groups;
  int32_t vectors;  // of a group; a multiple of 4
  bool accumulate;
};
struct bitmap_u8s8 {
  using Fn = bool(const Bitmap8Args&);
  using Table = Fn* const[kBitmapMaxTokens];
  static constexpr const char* doc = "masked int8 weights, expanded in registers, times few tokens";
};

// bitmap_expand, and the product with a few tokens on the way: acc[m][16 g + j] (+)= sum over the vectors of
// group g, for the tokens and groups of the table's entry. Not at levels that cannot expand bytes in
// registers.
struct BitmapExpandMultiplyArgs {
  const uint64_t* masks;   // [groups][vectors]
  const int8_t* values;    // all of the weight's
  const int8_t* end;       // as of BitmapExpandArgs
  const uint32_t* starts;  // [groups + 1]: where a group's values begin, and what follows the last one's
  int8_t* out;             // [groups][vectors][64], 64-byte aligned
  int32_t vectors;         // of a group; a multiple of 4
  const uint8_t* x;        // [tokens][x_stride], to the end of `vectors` units
  int64_t x_stride;
  int32_t* acc;  // 64-byte aligned
  int64_t acc_stride;
  bool accumulate;
};
struct bitmap_expand_u8s8 {
  // One function for each tile: index (tokens - 1) * kGemmPanels + groups - 1.
  using Fn = bool(const BitmapExpandMultiplyArgs&);
  using Table = Fn* const[kGemmTokens * kGemmPanels];
  static constexpr const char* doc =
      "masked int8 weights to a dense tile, multiplied with few tokens on the way";
};

// Rows of any of the float types to float32: to[row * to_stride + i] for i < units, and zeros up to `padded`.
struct RowsWidenArgs {
  const void* x;
  int64_t x_stride;  // elements
  DType dtype;       // f32, f16 or bf16
  int32_t rows, units, padded;
  float* to;
  int32_t to_stride;
};
struct rows_widen {
  using Fn = void(const RowsWidenArgs&);
  static constexpr const char* doc = "widen rows of activations to float32";
};

// Epilogue of products with outputs in lanes: y[token][i] = activation(acc[i / 16][token][i % 16] + bias[i]).
struct RowsStoreArgs {
  const float* acc;  // [outputs / 16, rounded up][tokens][16]
  int32_t tokens, outputs;
  const float* bias;  // [outputs], or null
  Activation activation;
  void* y;
  int64_t y_stride;  // elements between tokens
  DType dtype;       // f32, f16 or bf16: rounded to nearest even
};
struct rows_store {
  using Fn = void(const RowsStoreArgs&);
  static constexpr const char* doc = "bias, activation and narrowing of rows of outputs";
};

// Lanes of one vector of a convolution's panel row that lie side by side in the input: lane l reads element
// `offset + l` of the tap's view of a channel plane. A vector whose positions cross an output row or an image
// may be several runs.
struct ConvRun {
  int64_t offset;  // elements; may point outside the plane for lanes that no tap reads
  int32_t vector;
};

// Fills units [k0, k0 + units) of the reduction (channel, kernel row, kernel column) with the input elements
// that the tile's output positions read: im2col, a tile at a time. Padding is a cleared lane bit; a lane that
// is off touches no memory.
struct ConvPackArgs {
  const float* x;              // first image, first channel
  int64_t channel_stride;      // elements
  int32_t taps;                // kernel rows * kernel columns
  const int64_t* tap_offsets;  // [taps], elements
  const ConvRun* runs;         // ascending by vector, every vector at least once
  int32_t run_count;
  const uint16_t* lanes;  // [taps][run_count]: bit l set when the run holds lane l and it is no padding
  int64_t k0;
  int32_t units, vectors;
  int32_t stride;  // floats between units of the panel
  float* panel;
};
struct conv_pack {
  using Fn = void(const ConvPackArgs&);
  static constexpr const char* doc = "gather a convolution's input into a panel";
};

// Strips of vectors, one for each column of a kernel: vector (row, column) holds 16 output positions'
// elements of that input row and kernel column. It is read in pieces of equal length, one from each band of
// rows.
struct ConvStripRow {
  int64_t offset;  // elements from the band's first row; may point outside the plane where a band has none
  int32_t line;    // of the column's strip, in vectors
  uint32_t bands;  // bit b set: the row of band b is one of the plane's, not padding
};
struct ConvStripColumn {
  int64_t offset;  // elements; may point outside the plane for lanes that are off
  int32_t line;    // where the strip begins in the channel, in vectors
  uint32_t lanes;  // bit l set: lane l of a piece is an element of the plane, not padding
};
inline constexpr int kMaxBands = 4;

// Fills a panel with `channels` channels, each channel_lines vectors: the elements of all taps, those that
// several taps of a kernel column read once. A lane that is off touches no memory.
struct ConvStripArgs {
  const float* x;          // first channel
  int64_t channel_stride;  // elements
  int32_t channels, channel_lines;
  const ConvStripRow* rows;
  const ConvStripColumn* columns;
  int32_t row_count, column_count;
  int32_t bands;           // 1, 2 or 4: pieces of 16, 8 or 4 lanes
  const int64_t* band_at;  // [bands], elements from x to the piece
  float* panel;
};
struct conv_strips {
  using Fn = void(const ConvStripArgs&);
  static constexpr const char* doc = "gather strips of a convolution's input into a panel";
};

// Places of entries in a panel whose units are (channel, tap): out[i] = kLineStep * line, where offsets[i] is
// channel << 8 | tap and line = channel * channel_lines + tap_lines[tap], at most `last`. Writes up to 31
// places behind `count`.
inline constexpr int kLineStep = 32;
struct ConvPlacesArgs {
  const uint16_t* offsets;
  int32_t count;
  int32_t taps;
  const uint16_t* tap_lines;  // [256], zero from `taps` on
  int32_t channel_lines, last;
  uint16_t* out;
};
struct conv_places {
  using Fn = void(const ConvPlacesArgs&);
  static constexpr const char* doc = "where the entries of a convolution's weight lie in a panel";
};

// One phase of a strided convolution's input plane: y[r * y_stride + i] = x[r * x_stride + i * step],
// widened. Whole vectors of 16 are written: up to 15 elements behind a row are anything, so rows are given in
// ascending order of memory.
struct ConvSplitArgs {
  const void* x;
  DType dtype;  // f32, f16 or bf16
  int64_t step;
  int64_t x_stride, y_stride;  // elements between rows
  int64_t rows, count;
  int64_t ahead;  // elements from x to what is read afterwards in the same way, to bring it near; 0: nothing
  float* y;
};
struct conv_split {
  using Fn = void(const ConvSplitArgs&);
  static constexpr const char* doc = "every n-th row and column of an image plane, as float32";
};

// Positions of a tile that are contiguous in the output: one image's share of it.
struct ConvSpan {
  int32_t first, count;  // position in the tile
  int64_t offset;        // elements from y
};

// Epilogue of a convolution in NCHW: y[span.offset + row * row_stride + m] = activation(acc[row][span.first +
// m] + bias[row]). The accumulator's order is the output's, so nothing is transposed.
struct ConvStoreArgs {
  const float* acc;  // [rows][acc_stride]
  int32_t acc_stride, rows;
  const ConvSpan* spans;
  int32_t span_count;
  const float* bias;  // [rows], or null
  Activation activation;
  void* y;               // first row
  int64_t row_stride;    // elements between output channels
  DType dtype;           // f32, f16 or bf16: rounded to nearest even
  int64_t residual = 0;  // as in PanelStoreArgs
};
struct conv_store {
  using Fn = void(const ConvStoreArgs&);
  static constexpr const char* doc = "bias, activation and narrowing into an NCHW output";
};

inline constexpr int kMaxPoolRows = 8;
// The largest element of each window of a channel plane; NaN where a window has one. Padding counts as
// -infinity.
struct MaxPoolArgs {
  const void* x;  // [height, width], contiguous
  DType dtype;    // of x and y: f32, f16, bf16
  int64_t height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t out_h, out_w;
  // Scratch for kMaxPoolRows rows, 64-byte aligned: column 0 of the plane. -infinity in the pad_left elements
  // before it, and from `width` on to the last column that a window reaches.
  float* rows;
  int64_t row_stride;
  void* y;  // [out_h, out_w], contiguous
};
struct max_pool {
  using Fn = void(const MaxPoolArgs&);
  static constexpr const char* doc = "largest elements of windows of an image plane";
};

// Attention, a tile of queries at a time, with queries in lanes: the same panel as everywhere, but times a
// matrix that is no packed weight: acc[r][m] = scale[m] * sum_k a(r, k) panel[k][m]. With a = K the panel is
// the queries and acc the scores; with a = V, read by columns, the panel is the weights of the keys and acc
// the output, transposed.
inline constexpr int kAttentionGroups = 4;  // of 16 queries
struct RowsPanelArgs {
  const float* a;
  int64_t a_stride;    // elements between rows of memory
  bool by_columns;     // a(r, k) is a[k * a_stride + r], not a[r * a_stride + k]
  const float* panel;  // [units][groups * 16], 64-byte aligned
  const float* keep;   // [groups * 16]: acc is multiplied with it and added to; null: acc is overwritten
  const float* scale;  // [groups * 16]: what the result is multiplied with, or null for 1
  float* acc;          // [rows][groups * 16], 64-byte aligned
  int32_t rows;
  int64_t units;
};
struct rows_panel_f32 {
  // One function for each number of groups, 1..kAttentionGroups, at index groups - 1.
  using Fn = void(const RowsPanelArgs&);
  using Table = Fn* const[kAttentionGroups];
  static constexpr const char* doc = "rows of a plain matrix times a panel, float32";
};

// Weights of a block of keys, in place: s[k][m] = exp(s[k][m] + mask[k][m] - largest), where the largest is
// that of lane m so far. What blocks before it gave has to be multiplied with keep[m] then; inverse[m] is the
// inverse of the sum of all weights so far. A lane with -infinity for all keys gets weights of zero; a NaN
// makes the inverse NaN.
struct SoftmaxArgs {
  float* s;                               // [keys][groups * 16], 64-byte aligned
  const float* mask;                      // the same shape, or null
  float *largest, *sum, *keep, *inverse;  // [groups * 16] each, 64-byte aligned
  int64_t keys;
  int32_t groups;
  bool first;  // largest and sum begin; keep is not written
};
struct softmax_columns {
  using Fn = void(const SoftmaxArgs&);
  static constexpr const char* doc = "softmax over the rows of a panel, block by block";
};

// y[r] = (s - mean) / sqrt(variance + eps) * weight + bias, with s = x[r] + residual[r] in float32, and the
// mean and the (biased) variance those of s over the row, in two passes. A NaN or an infinity makes its row
// NaN.
struct LayerNormArgs {
  const void* x;
  int64_t x_stride;      // elements between rows
  const void* residual;  // [rows][cols], or null
  int64_t residual_stride;
  DType dtype;  // of x, residual, sum and y: f32, f16 or bf16
  int64_t rows, cols;
  const float *weight, *bias;  // [cols], or null for 1 and 0
  float eps;
  float* row;  // scratch: cols rounded up to 64, 64-byte aligned
  void* sum;   // where s goes, or null
  int64_t sum_stride;
  void* y;
  int64_t y_stride;
};
struct layer_norm {
  using Fn = void(const LayerNormArgs&);
  static constexpr const char* doc = "residual add and layer normalisation of rows";
};

// What benchmarks measure the kernels against. `floats` is a multiple of 128 and data[0 ... floats) ones; the
// loop goes over them `repeats` times. *done: steps of eight vectors that were carried out.
enum class MachineProbe : uint8_t { fma, load, store, panel, dot8 };
struct MachineProbeArgs {
  MachineProbe probe;
  float* data;  // 64-byte aligned
  int64_t floats, repeats;
  float* done;
};
struct machine_probe {
  using Fn = void(const MachineProbeArgs&);
  static constexpr const char* doc = "ceilings of this machine, for benchmarks";
};

}  // namespace pared
