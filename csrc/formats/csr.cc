#include "formats/csr.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/parallel.h"
#include "formats/formats.h"
#include "formats/values.h"

namespace pared {
namespace {

using namespace panel_layout;  // NOLINT: this file fills and reads that layout

// Calls fn(column, value) for each element of a row that may be stored. One loop for every source.
template <class F>
void for_row(const DenseView& w, int64_t row, F fn) {
  const int64_t base = row * w.row_stride;
  const int64_t first = row / (w.rows / w.groups) * w.cols;  // of the row's diagonal block
  for (int64_t c = 0; c < w.cols; ++c) {
    const float v = value_at(w.data, base + c * w.col_stride, w.dtype);
    if (v != 0.0f) fn(first + c, v);
  }
}

int64_t index_at(const void* p, int64_t i, DType t) {
  return t == DType::i32 ? static_cast<const int32_t*>(p)[i] : static_cast<const int64_t*>(p)[i];
}

template <class F>
void for_row(const CsrView& w, int64_t row, F fn) {
  const int64_t end = index_at(w.row_ptr, row + 1, w.index_type);
  for (int64_t i = index_at(w.row_ptr, row, w.index_type); i < end; ++i)
    fn(index_at(w.columns, i, w.index_type), value_at(w.values, i, w.dtype));
}

int64_t matrix_cols(const DenseView& w) { return w.cols * w.groups; }
int64_t matrix_cols(const CsrView& w) { return w.cols; }

// Calls fn(column, values) for each entry of a slot, columns ascending. `scratch` is the caller's, empty at
// first.
template <class View, class F>
void for_entries(const View& w, int64_t slot, int entry_rows, std::vector<float>& scratch, F fn) {
  if (entry_rows == 1) {
    if (slot < w.rows)
      for_row(w, slot, [&](int64_t c, float v) {
        if (is_stored(v)) fn(c, &v);
      });
    return;
  }
  // The rows of a quad meet in a dense strip, which is left zero for the next.
  scratch.resize(matrix_cols(w) * entry_rows);
  int64_t first = matrix_cols(w), end = 0;
  for (int r = 0; r < entry_rows && slot * entry_rows + r < w.rows; ++r)
    for_row(w, slot * entry_rows + r, [&](int64_t c, float v) {
      if (!is_stored(v)) return;
      scratch[c * entry_rows + r] = v;
      first = std::min(first, c);
      end = std::max(end, c + 1);
    });
  for (int64_t c = first; c < end; ++c) {
    float* values = &scratch[c * entry_rows];
    if (std::all_of(values, values + entry_rows, [](float v) { return v == 0.0f; })) continue;
    fn(c, values);
    std::fill_n(values, entry_rows, 0.0f);
  }
}

// What panel.h asks for the entries of a weight.
template <class View>
auto new_entries(const View& w, int entry_rows) {
  return [&w, entry_rows] {
    return [&w, entry_rows, scratch = std::vector<float>()](int64_t slot, auto fn) mutable {
      for_entries(w, slot, entry_rows, scratch, fn);
    };
  };
}

void check_structure(const DenseView&) {}

void check_structure(const CsrView& w) {
  PARED_CHECK(index_at(w.row_ptr, 0, w.index_type) == 0, "crow_indices: expected to start at 0");
  const int64_t nnz = index_at(w.row_ptr, w.rows, w.index_type);
  for (int64_t r = 0; r < w.rows; ++r) {
    const int64_t b = index_at(w.row_ptr, r, w.index_type), e = index_at(w.row_ptr, r + 1, w.index_type);
    PARED_CHECK(b <= e && e <= nnz, "crow_indices: expected a non-decreasing sequence up to ", nnz, ", got ",
                b, " then ", e, " at row ", r);
    int64_t previous = -1;
    for (int64_t i = b; i < e; ++i) {
      const int64_t c = index_at(w.columns, i, w.index_type);
      PARED_CHECK(c > previous && c < w.cols, "col_indices: expected ascending unique columns below ", w.cols,
                  " in each row, got ", c, " after ", previous, " in row ", r);
      previous = c;
    }
  }
}

// The taps of a channel where offsets tell them apart, else 0. Kernels of one row share no elements between
// taps of one tile; more than 255 taps do not fit a K block.
int coded_taps(int entry_rows, int64_t kh, int64_t kw) {
  return entry_rows == 1 && kh > 1 && kh * kw <= UINT8_MAX ? static_cast<int>(kh * kw) : 0;
}

UnitCode unit_code(const PackedHeader& h) {
  return {coded_taps(h.entry_rows, h.kh, h.kw), h.tile * static_cast<uint32_t>(sizeof(float))};
}

// Tile and K block by density. The panel block (tile * block_k floats) should fit L1 beside the accumulators
// and the stream of weights: 32 to 40 KB while rows are dense. Below about twenty non-zeros a row and block
// the accumulators' load and store and the end of the inner loop cost more than a panel that comes partly
// from L2, so the block gets deeper; a very sparse weight also needs the depth for its size (two bytes a row
// and block). Bound: tile * block_k * 4 <= 65536, the reach of a 16-bit offset. 256 units are a
// third of 768 columns, where 240 leave a short fourth block: 1.06 to 1.11 times as fast at 95 % zeros (Zen
// 4). Linear, Zen 5, one thread, time of {128, 80} (50 to 80 % zeros) and {128, 128} over that of others,
// 768x768 with 384 tokens, 3072x768 and 768x3072 with 128:
//   50 %: {128, 64} 1.00-1.02, {64, 128} 1.00         70 %: {64, 128} 1.01-1.03, {64, 160} 1.01
//   80 %: {64, 128} 1.05-1.06, {64, 160} 1.04-1.06     90 %: {64, 160} 1.10-1.12, {64, 192} 1.11
//   95 %: {64, 160} 1.11, {64, 240} 1.13-1.23
// Quads (blocks of 4x1, dense), the same shapes, time of {96, 96} over that of others:
//   dense: {64, 160} 1.02-1.13    50 %: {64, 160} 1.05-1.09    70 %: {64, 192} 1.03-1.11
//   80 %: {64, 192} 1.09-1.12, {64, 240} 1.09-1.13    90 %: {64, 240} 1.16-1.28    95 %: {64, 240} 1.28-1.37
// One tile for all densities lets layers that differ in theirs share a packed input. A 1x1 convolution wants
// long runs of a channel instead: with 64 positions, 256 bytes, it takes up to twice as long. The weights of
// a network's last convolutions, a million and more, meet 7x7 images, of which one is a narrow tile: deeper
// blocks fit, 15 % faster at 80 % zeros, and cost nothing on wide tiles ({128, 80}: 2316 us for the five of
// ResNet-50 together, {128, 128}: 1978 us).
constexpr double kDeepConvolution = 1 << 20;
// The taps of a channel share their elements in a panel of strips (ops/conv_strips.h): 16 channels of a 3x3
// kernel are 28 KB with tiles of seven vectors, 22 are 25 KB with the four of a 7x7 image. At 90 % zeros, one
// thread: 144 units instead of 189 make no difference to 64 to 256 filters, 200 instead of 144 are 18 %
// faster for 512 at 7x7.
constexpr int kStripUnits = 150, kDeepStripUnits = 200;
struct Tiling {
  uint32_t tile, block_k;
};
Tiling choose_tiling(int64_t rows, int64_t cols, int64_t nnz, int entry_rows, const ConvShape& conv) {
  const double cells = static_cast<double>(rows) * static_cast<double>(cols);
  if (const int taps = coded_taps(entry_rows, conv.kh, conv.kw)) {
    const int channels = (cells >= kDeepConvolution ? kDeepStripUnits : kStripUnits) / taps;
    return {128, static_cast<uint32_t>(std::max(1, channels) * taps)};
  }
  const double density = cells > 0 ? static_cast<double>(nnz) / cells : 1.0;
  if (entry_rows == kQuadRows) {
    // Four rows of sums, six vectors and a broadcast fill the registers at 96 positions.
    if (conv.kh > 0) return {96, 96};
    return {64, density >= 0.4 ? 160u : density >= 0.15 ? 192u : 256u};
  }
  if (conv.kh > 0) {
    if (density >= 0.14) return {128, cells >= kDeepConvolution && density < 0.3 ? 128u : 80u};
    if (density >= 0.04) return {128, 128};
    return {64, 256};
  }
  if (density >= 0.14) return {64, 128};
  if (density >= 0.06) return {64, 160};
  return {64, 256};
}

template <class View>
PanelPlan make_plan(const View& w, const ConvShape& conv, PackedKind kind, int entry_rows) {
  PARED_CHECK(w.rows >= 0 && w.rows < kMaxSize && w.cols >= 0 && w.cols < kMaxSize,
              "weight: expected sizes from 0 to 2^48, got [", w.rows, ", ", w.cols, "]");
  check_structure(w);
  std::atomic<int64_t> nnz{0}, bad_row{-1};
  parallel_for(0, w.rows, 32, [&](int64_t r0, int64_t r1) {
    int64_t n = 0;
    for (int64_t r = r0; r < r1; ++r)
      for_row(w, r, [&](int64_t, float v) {
        n += is_stored(v);
        if (!std::isfinite(v)) bad_row.store(r, std::memory_order_relaxed);
      });
    nnz.fetch_add(n, std::memory_order_relaxed);
  });
  PARED_CHECK(bad_row.load() < 0, "weight: expected finite values, got NaN or infinity in row ",
              bad_row.load());
  PARED_CHECK(nnz.load() < kMaxNonZeros, "weight: expected fewer than 2^32 non-zeros, got ", nnz.load());

  const int64_t cols = matrix_cols(w);
  const Tiling tiling = choose_tiling(w.rows, cols, nnz.load(), entry_rows, conv);
  PanelPlan plan{};
  PackedHeader& h = plan.header;
  h = new_header(kind, w.dtype, w.rows, cols);
  h.entry_rows = static_cast<uint8_t>(entry_rows);
  h.nnz = nnz.load();
  h.channels = conv.channels;
  h.kh = conv.kh;
  h.kw = conv.kw;
  h.groups = conv.groups;
  h.tile = tiling.tile;
  h.block_k = tiling.block_k;

  plan_panel<float>(plan, cols, Sections(sizeof(PackedHeader)), new_entries(w, entry_rows));
  return plan;
}

template <class View>
void write(const View& w, const PanelPlan& plan, uint8_t* out) {
  write_panel<float>(plan, plan.header.cols, unit_code(plan.header), new_entries(w, plan.header.entry_rows),
                     out);
  seal(plan.header, out);
}

}  // namespace

PanelPlan plan_csr(const DenseView& w, const ConvShape& conv, PackedKind kind, int entry_rows) {
  return make_plan(w, conv, kind, entry_rows);
}
PanelPlan plan_csr(const CsrView& w, const ConvShape& conv, PackedKind kind, int entry_rows) {
  return make_plan(w, conv, kind, entry_rows);
}
void pack_csr(const DenseView& w, const PanelPlan& plan, uint8_t* out) { write(w, plan, out); }
void pack_csr(const CsrView& w, const PanelPlan& plan, uint8_t* out) { write(w, plan, out); }

CsrPacked view_csr(const uint8_t* data, int64_t bytes) {
  const PackedHeader* h = &checked_header(data, bytes);
  PARED_CHECK(h->kind == PackedKind::csr || h->kind == PackedKind::bsr || h->kind == PackedKind::dense,
              "packed weight: expected CSR, BSR or dense, got kind ", static_cast<int>(h->kind));
  check_conv_shape(*h);
  return panel_layout::view_panel<float>(*h, h->cols, unit_code(*h));
}

void validate_csr(const CsrPacked& w) {
  panel_layout::validate_panel(w, [](int64_t row, int64_t, float v) {
    PARED_CHECK(is_stored(v) && std::isfinite(v), "packed weight: row ", row, ": invalid value ", v);
    return 1;
  });
}

void unpack_csr(const CsrPacked& w, int64_t* row_ptr, int64_t* columns, float* values) {
  validate_csr(w);  // it writes where the contents say
  int64_t n = 0, row = 0;
  row_ptr[0] = 0;
  panel_layout::for_each_value(w, [&](int64_t r, int64_t c, float v) {
    while (row < r) row_ptr[++row] = n;
    columns[n] = c;
    values[n++] = v;
  });
  while (row < w.header->rows) row_ptr[++row] = n;
}

void unpack_csr_dense(const CsrPacked& w, DType dtype, void* out) {
  validate_csr(w);
  const int64_t cols = dense_cols(*w.header);
  std::fill_n(static_cast<uint8_t*>(out), w.header->rows * cols * dtype_size(dtype), uint8_t{0});
  panel_layout::for_each_value(w, [&](int64_t r, int64_t c, float v) {
    const int64_t i = r * cols + c % cols;
    store_value(out, i, dtype, v);
  });
}

}  // namespace pared
