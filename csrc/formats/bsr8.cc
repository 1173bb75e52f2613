#include "formats/bsr8.h"

#include <atomic>
#include <cmath>

#include "formats/formats.h"
#include "formats/values.h"

namespace pared {
namespace {

using namespace panel_layout;  // NOLINT: this file fills and reads that layout

constexpr int kUnit = kInt8Unit;

// The bytes of rows, quantised the same way each time.
class ByteRows {
 public:
  ByteRows(const DenseView& w, const Int8Words& words, const float* scales)
      : w_(w), words_(words), scales_(scales) {}

  // Largest magnitude of a row of float type; NaN or infinity when it holds one.
  float largest(int64_t row) const {
    float most = 0.0f;
    for (int64_t c = 0; c < w_.cols; ++c) {
      const float v = std::fabs(value_at(w_.data, at(row, c), w_.dtype));
      if (!(v <= most)) most = v;
      if (std::isnan(v)) return v;
    }
    return most;
  }
  // words.per_row() * kUnit bytes.
  void read(int64_t row, int8_t* out) const {
    std::fill_n(out, words_.per_row() * kUnit, int8_t{0});
    const float scale = scales_[row];
    for (int64_t c = 0; c < w_.cols; ++c) {
      if (w_.dtype == DType::i8) {
        out[words_.byte(c)] = static_cast<const int8_t*>(w_.data)[at(row, c)];
      } else if (scale != 0.0f) {
        // Within 127 (1 + 2^-23) of zero: adding 1.5 * 2^23 rounds to the nearest even integer.
        const float q = value_at(w_.data, at(row, c), w_.dtype) / scale + 12582912.0f;
        out[words_.byte(c)] = static_cast<int8_t>(q - 12582912.0f);
      }
    }
  }

 private:
  int64_t at(int64_t row, int64_t c) const { return row * w_.row_stride + c * w_.col_stride; }

  const DenseView& w_;
  const Int8Words& words_;
  const float* scales_;
};

// What panel.h asks for: the entries of a slot, a word (or four) that is not zero.
auto new_entries(const DenseView& w, const Int8Words& words, const float* scales, int entry_rows) {
  return [=, &w, &words] {
    return [=, &w, &words, bytes = std::vector<int8_t>(words.per_row() * kUnit * entry_rows)](
               int64_t slot, auto fn) mutable {
      const ByteRows rows(w, words, scales);
      const int64_t row0 = slot * entry_rows, per_row = words.per_row();
      if (row0 >= w.rows) return;
      // The rows of a quad that lie in different groups of a convolution share no unit.
      int32_t values[kQuadRows];
      const int64_t group_rows = w.rows / words.groups;
      for (int r = 0; r < entry_rows; ++r) {
        if (row0 + r < w.rows) rows.read(row0 + r, bytes.data() + r * per_row * kUnit);
      }
      const auto group_of = [&](int r) { return (row0 + r) / group_rows; };
      const int real = static_cast<int>(std::min<int64_t>(entry_rows, w.rows - row0));
      for (int64_t g = group_of(0); g <= group_of(real - 1); ++g)
        for (int64_t u = 0; u < per_row; ++u) {
          bool any = false;
          for (int r = 0; r < entry_rows; ++r) {
            values[r] = 0;
            if (r < real && group_of(r) == g)
              std::memcpy(&values[r], &bytes[(r * per_row + u) * kUnit], kUnit);
            any |= values[r] != 0;
          }
          if (any) fn(g * per_row + u, values);
        }
    };
  };
}

int non_zero_bytes(int32_t word) {
  int n = 0;
  for (int i = 0; i < 32; i += 8) n += ((static_cast<uint32_t>(word) >> i) & 0xffu) != 0;
  return n;
}

// Tile and K block by the share of units that are stored: the panel's block stays in L1 (48 KB) while rows
// are dense, and gets deeper where a row has few units in it, as for float32 (formats/csr.cc). Measured on
// Zen 5, 128 tokens, microseconds, geometric mean over 768x768, 3072x768, 768x3072 and 384x384 at 50/80/90 %
// block sparsity:
//   1x4: {128, 64} 270/155/118, {128, 80} 274/154/117, {128, 128} 302/154/114, {64, 192} 292/153/110
//   4x4: {96, 64} 210/113/90, {96, 96} 206/109/84, {96, 128} 206/109/84, {64, 192} 200/106/80
struct Tiling {
  uint32_t tile, block_k;
};
Tiling choose_tiling(int64_t rows, int64_t units, int64_t entries, int entry_rows) {
  if (entry_rows == kQuadRows) return {64, 192};
  const double cells = static_cast<double>(rows) * static_cast<double>(units);
  return static_cast<double>(entries) >= 0.15 * cells ? Tiling{128, 64} : Tiling{64, 192};
}

}  // namespace

Bsr8Plan plan_bsr8(const DenseView& w, const ConvShape& conv, const float* scales, int entry_rows,
                   DType dtype, const ActivationRange& activations) {
  PARED_CHECK(w.rows >= 0 && w.rows < kMaxSize, "weight: expected rows from 0 to 2^48, got ", w.rows);
  PARED_CHECK(w.cols >= 0 && w.cols <= kInt8MaxCols, "weight: expected at most ", kInt8MaxCols,
              " elements a row (sums are exact in int32 up to there), got ", w.cols);
  check_activations(activations);
  Bsr8Plan plan{};
  plan.activations = activations;
  PackedHeader& h = plan.panel.header;
  h = new_header(PackedKind::bsr8, scales ? dtype : w.dtype, w.rows, w.cols * w.groups);
  h.channels = conv.channels;
  h.kh = conv.kh;
  h.kw = conv.kw;
  h.groups = conv.groups;
  const Int8Words words = int8_words(h);

  plan.scales.resize(w.rows);
  plan.sums.resize(w.rows);
  std::atomic<int64_t> bad_row{-1}, nnz{0}, row_entries{0}, quad_entries{0};
  const auto plan_rows = [&](int64_t r0, int64_t r1) {
    const ByteRows rows(w, words, plan.scales.data());
    const int64_t bytes = words.per_row() * kUnit;
    std::vector<int8_t> row(bytes);
    std::vector<uint8_t> quad(words.per_row());  // words that a row of the quad uses
    int64_t n = 0, singles = 0, quads = 0;
    for (int64_t r = r0; r < r1; ++r) {
      const float most = scales ? scales[r] : rows.largest(r);
      if (!std::isfinite(most) || most < 0.0f) bad_row.store(r, std::memory_order_relaxed);
      plan.scales[r] = scales ? most : most >= kSmallestMax ? most / 127.0f : 0.0f;
      rows.read(r, row.data());
      int32_t sum = 0;
      for (int64_t i = 0; i < bytes; ++i) {
        sum += row[i];
        n += row[i] != 0;
      }
      plan.sums[r] = sum;
      for (int64_t u = 0; u < words.per_row(); ++u) {
        int32_t word;
        std::memcpy(&word, &row[u * kUnit], kUnit);
        singles += word != 0;
        quads += word != 0 && !quad[u];
        quad[u] |= word != 0;
      }
      if (r % kQuadRows == kQuadRows - 1) std::fill(quad.begin(), quad.end(), uint8_t{0});
    }
    nnz.fetch_add(n, std::memory_order_relaxed);
    row_entries.fetch_add(singles, std::memory_order_relaxed);
    quad_entries.fetch_add(quads, std::memory_order_relaxed);
  };
  // Tasks begin at whole quads.
  const int64_t quad_count = (w.rows + kQuadRows - 1) / kQuadRows;
  parallel_for(0, quad_count, 8,
               [&](int64_t q0, int64_t q1) { plan_rows(q0 * kQuadRows, std::min(w.rows, q1 * kQuadRows)); });
  PARED_CHECK(bad_row.load() < 0, scales ? "scales" : "weight", ": expected finite ",
              scales ? "positive values" : "values", ", got ",
              scales ? scales[bad_row.load()] : std::nanf(""), " in row ", bad_row.load());
  PARED_CHECK(nnz.load() < kMaxNonZeros, "weight: expected fewer than 2^32 non-zeros, got ", nnz.load());
  // A quad's entry costs four multiply-adds a vector, a single row's one and the load that a quad shares.
  if (entry_rows == 0)
    entry_rows = 7 * kQuadRows * quad_entries.load() <= 8 * row_entries.load() ? kQuadRows : 1;

  h.nnz = nnz.load();
  h.entry_rows = static_cast<uint8_t>(entry_rows);
  const Tiling tiling =
      choose_tiling(w.rows, words.units(), (entry_rows == 1 ? row_entries : quad_entries).load(), entry_rows);
  h.tile = tiling.tile;
  h.block_k = tiling.block_k;
  Sections sections(sizeof(PackedHeader));
  sections.add(w.rows * sizeof(float));
  sections.add(w.rows * sizeof(int32_t));
  sections.add(sizeof(ActivationRange));
  plan_panel<int32_t>(plan.panel, words.units(), sections,
                      new_entries(w, words, plan.scales.data(), entry_rows));
  return plan;
}

UnitCode word_code(const PackedHeader& h) { return {0, h.tile * static_cast<uint32_t>(sizeof(int32_t))}; }

void pack_bsr8(const DenseView& w, const Bsr8Plan& plan, uint8_t* out) {
  const PackedHeader& h = plan.panel.header;
  const Int8Words words = int8_words(h);
  write_panel<int32_t>(plan.panel, words.units(), word_code(h),
                       new_entries(w, words, plan.scales.data(), h.entry_rows), out);
  Sections sections(sizeof(PackedHeader));
  std::copy(plan.scales.begin(), plan.scales.end(),
            reinterpret_cast<float*>(out + sections.add(h.rows * sizeof(float))));
  std::copy(plan.sums.begin(), plan.sums.end(),
            reinterpret_cast<int32_t*>(out + sections.add(h.rows * sizeof(int32_t))));
  *reinterpret_cast<ActivationRange*>(out + sections.add(sizeof(ActivationRange))) = plan.activations;
  seal(h, out);
}

Bsr8Packed view_bsr8(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  PARED_CHECK(h.kind == PackedKind::bsr8, "packed weight: expected int8 blocks (bsr8), got kind ",
              static_cast<int>(h.kind));
  check_conv_shape(h);
  PARED_CHECK(dense_cols(h) <= kInt8MaxCols, "packed weight: expected at most ", kInt8MaxCols,
              " elements a row, got a corrupt header");
  Bsr8Packed w;
  w.panel = view_panel<int32_t>(h, int8_words(h).units(), word_code(h));
  Sections sections(sizeof(PackedHeader));
  const size_t scales_at = sections.add(h.rows * sizeof(float));
  const size_t sums_at = sections.add(h.rows * sizeof(int32_t));
  check_section(h, scales_at, h.rows * sizeof(float));
  const size_t activations_at = sections.add(sizeof(ActivationRange));
  check_section(h, sums_at, h.rows * sizeof(int32_t));
  check_section(h, activations_at, sizeof(ActivationRange));
  w.scales = reinterpret_cast<const float*>(data + scales_at);
  w.sums = reinterpret_cast<const int32_t*>(data + sums_at);
  w.activations = reinterpret_cast<const ActivationRange*>(data + activations_at);
  check_activations(*w.activations, "packed weight: ");
  return w;
}

void validate_bsr8(const Bsr8Packed& w) {
  const PackedHeader& h = *w.panel.header;
  const Int8Words words = int8_words(h);
  std::vector<int32_t> sums(h.rows);
  validate_panel(w.panel, [&](int64_t row, int64_t unit, int32_t word) {
    PARED_CHECK(row < h.rows && row / (h.rows / words.groups) == unit / words.per_row(),
                "packed weight: row ", row, ": a block outside the row's group");
    int8_t bytes[kUnit];
    std::memcpy(bytes, &word, kUnit);
    const int64_t first = unit % words.per_tap() * kUnit;
    for (int i = 0; i < kUnit; ++i) {
      PARED_CHECK(first + i < words.channels || bytes[i] == 0, "packed weight: row ", row,
                  ": a value behind the last input");
      sums[row] += bytes[i];
    }
    return non_zero_bytes(word);
  });
  for (int64_t r = 0; r < h.rows; ++r) {
    PARED_CHECK(std::isfinite(w.scales[r]) && w.scales[r] >= 0.0f, "packed weight: row ", r,
                ": invalid scale ", w.scales[r]);
    PARED_CHECK(w.sums[r] == sums[r], "packed weight: row ", r, ": expected sum ", sums[r], ", got ",
                w.sums[r]);
  }
}

namespace {

// Calls fn(row, column as the user knows it, q) for every byte that is not zero.
template <class F>
void for_each_byte(const Bsr8Packed& w, F fn) {
  validate_bsr8(w);  // what follows writes where the contents say
  const Int8Words words = int8_words(*w.panel.header);
  for_each_value(w.panel, [&](int64_t row, int64_t unit, int32_t word) {
    int8_t bytes[kUnit];
    std::memcpy(bytes, &word, kUnit);
    const int64_t u = unit % words.per_row(), tap = u / words.per_tap(),
                  channel = u % words.per_tap() * kUnit;
    for (int i = 0; i < kUnit; ++i)
      if (bytes[i] != 0) fn(row, (channel + i) * words.taps + tap, bytes[i]);
  });
}

}  // namespace

void unpack_bsr8_values(const Bsr8Packed& w, int8_t* out) {
  const int64_t cols = dense_cols(*w.panel.header);
  std::fill_n(out, w.panel.header->rows * cols, int8_t{0});
  for_each_byte(w, [&](int64_t row, int64_t c, int8_t q) { out[row * cols + c] = q; });
}

void unpack_bsr8_dense(const Bsr8Packed& w, DType dtype, void* out) {
  const int64_t cols = dense_cols(*w.panel.header);
  std::fill_n(static_cast<uint8_t*>(out), w.panel.header->rows * cols * dtype_size(dtype), uint8_t{0});
  for_each_byte(w, [&](int64_t row, int64_t c, int8_t q) {
    const float v = static_cast<float>(q) * w.scales[row];
    const int64_t i = row * cols + c;
    store_value(out, i, dtype, v);
  });
}

}  // namespace pared
