#include "formats/int8.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "core/aligned.h"
#include "core/check.h"
#include "core/parallel.h"
#include "formats/formats.h"
#include "formats/values.h"

namespace pared {
namespace {

constexpr int64_t kPanelsPerTask = 2;

// Where rows and their elements lie.
struct Layout {
  explicit Layout(const PackedHeader& h) : words(int8_words(h)), units(words.per_row()) {
    group_rows = h.rows / words.groups;
    group_panels = (group_rows + kInt8Panel - 1) / kInt8Panel;
  }
  int64_t panels() const { return words.groups * group_panels; }
  // Of the padded rows.
  int64_t place(int64_t row) const { return row / group_rows * group_panels * kInt8Panel + row % group_rows; }
  // The row at a place; -1 for padding.
  int64_t row(int64_t place) const {
    const int64_t padded = group_panels * kInt8Panel, r = place % padded;
    return r < group_rows ? place / padded * group_rows + r : -1;
  }
  // Byte b of a place.
  int64_t at(int64_t place, int64_t b) const {
    return ((place / kInt8Panel * units + b / kInt8Unit) * kInt8Panel + place % kInt8Panel) * kInt8Unit +
           b % kInt8Unit;
  }

  Int8Words words;
  int64_t units, group_rows, group_panels;
};

}  // namespace

Int8Words int8_words(const PackedHeader& h) {
  if (h.kh == 0) return {1, h.cols, 1};
  return {static_cast<int64_t>(h.kh) * h.kw, h.channels, h.groups};
}

bool operator==(const ActivationRange& a, const ActivationRange& b) {
  return a.scale == b.scale && a.zero == b.zero && a.low == b.low && a.high == b.high;
}

void check_activations(const ActivationRange& a, const char* of) {
  if (a.scale == 0.0f) {
    PARED_CHECK(a.zero == 128 && a.low == 1 && a.high == 255, of,
                "activations: expected zero 128, low 1 and high 255 where they are dynamic");
    return;
  }
  PARED_CHECK(std::isfinite(a.scale) && a.scale >= FLT_MIN && a.scale <= 1 / FLT_MIN, of,
              "activation_scale: expected a positive, normal number up to 2^126, got ", a.scale);
  PARED_CHECK(0 <= a.low && a.low <= a.zero && a.zero <= a.high && a.high <= 255, of,
              "activations: expected 0 <= low <= zero <= high <= 255 as unsigned bytes, got ", a.low, ", ",
              a.zero, ", ", a.high);
}

PackedHeader plan_int8(const Int8Source& source, const ConvShape& conv, DType dtype,
                       const ActivationRange& activations) {
  const DenseView& w = source.values;
  PARED_CHECK(w.rows >= 0 && w.rows < kMaxSize / 2 && w.cols >= 0 && w.cols <= kInt8MaxCols,
              "weight: expected at most ", kInt8MaxCols,
              " inputs, beyond which int32 sums could overflow, got [", w.rows, ", ", w.cols, "]");
  for (int64_t n = 0; n < (source.scales ? w.rows : 0); ++n)
    PARED_CHECK(std::isfinite(source.scales[n]) && source.scales[n] >= 0.0f,
                "scales: expected finite numbers of at least 0, got ", source.scales[n], " for row ", n);
  check_activations(activations);
  PackedHeader h = new_header(PackedKind::int8, dtype, w.rows, w.cols * w.groups);
  h.channels = conv.channels;
  h.kh = conv.kh;
  h.kw = conv.kw;
  h.groups = conv.groups;
  const Layout layout(h);
  const uint64_t panels = layout.panels();
  h.values_at = round_up(kInt8TailAt + sizeof(Int8Tail), kCacheLine);
  h.bytes = h.values_at + panels * layout.units * kInt8Panel * kInt8Unit +
            2 * round_up(panels * kInt8Panel * sizeof(float), kCacheLine);
  return h;
}

int64_t quantize_panel(const Int8Source& source, const PackedHeader& h, const ActivationRange& activations,
                       int64_t panel, int8_t* bytes, float* scales, int32_t* compensation) {
  const Layout layout(h);
  const DenseView& w = source.values;
  std::fill_n(bytes, layout.units * kInt8Panel * kInt8Unit, int8_t{0});
  int64_t stored = 0;
  for (int64_t n = 0; n < kInt8Panel; ++n) {
    scales[n] = 0.0f;
    compensation[n] = 0;
    const int64_t row = layout.row(panel * kInt8Panel + n);
    if (row < 0) continue;
    const auto at = [&](int64_t k) { return row * w.row_stride + k * w.col_stride; };
    int64_t sum = 0;
    const auto put = [&](int64_t k, int q) {
      bytes[layout.at(n, layout.words.byte(k))] = static_cast<int8_t>(q);
      sum += q;
      stored += q != 0;
    };
    if (source.scales) {
      scales[n] = source.scales[row];
      const auto* q = static_cast<const int8_t*>(w.data);
      for (int64_t k = 0; k < w.cols; ++k) put(k, q[at(k)]);
    } else {
      float largest = 0.0f;
      bool finite = true;
      for (int64_t k = 0; k < w.cols; ++k) {
        const float v = std::fabs(value_at(w.data, at(k), w.dtype));
        finite = finite && v <= FLT_MAX;
        largest = std::max(largest, v);
      }
      PARED_CHECK(finite, "weight: expected finite values, got NaN or infinity in row ", row);
      if (largest < kSmallestMax) continue;
      scales[n] = largest / 127.0f;
      for (int64_t k = 0; k < w.cols; ++k)
        put(k, static_cast<int>(std::lrintf(value_at(w.data, at(k), w.dtype) / scales[n])));
    }
    compensation[n] = static_cast<int32_t>(sum * activations.zero);
  }
  return stored;
}

void pack_int8(const Int8Source& w, const ActivationRange& activations, PackedHeader h, uint8_t* out) {
  std::memset(out, 0, h.values_at);
  const Layout layout(h);
  const int64_t panels = layout.panels(), panel_bytes = layout.units * kInt8Panel * kInt8Unit;
  Int8Tail tail;
  tail.compensation_at = h.bytes - round_up(panels * kInt8Panel * sizeof(int32_t), kCacheLine);
  tail.scales_at = tail.compensation_at - round_up(panels * kInt8Panel * sizeof(float), kCacheLine);
  tail.activations = activations;
  std::memcpy(out + kInt8TailAt, &tail, sizeof(tail));
  auto* weights = reinterpret_cast<int8_t*>(out + h.values_at);
  auto* scales = reinterpret_cast<float*>(out + tail.scales_at);
  auto* compensation = reinterpret_cast<int32_t*>(out + tail.compensation_at);
  std::atomic<int64_t> nnz{0};
  parallel_for(0, panels, kPanelsPerTask, [&](int64_t p0, int64_t p1) {
    int64_t stored = 0;
    for (int64_t p = p0; p < p1; ++p)
      stored += quantize_panel(w, h, activations, p, weights + p * panel_bytes, scales + p * kInt8Panel,
                               compensation + p * kInt8Panel);
    nnz.fetch_add(stored, std::memory_order_relaxed);
  });
  h.nnz = h.entries = nnz.load();
  seal(h, out);
}

Int8Packed view_int8(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  PARED_CHECK(h.kind == PackedKind::int8, "packed weight: expected int8, got kind ",
              static_cast<int>(h.kind));
  check_conv_shape(h);
  PARED_CHECK(bytes >= static_cast<int64_t>(kInt8TailAt + sizeof(Int8Tail)) &&
                  dense_cols(h) <= kInt8MaxCols && h.rows < kMaxSize / 2 && h.nnz >= 0,
              "packed weight: expected a valid header, got a corrupt one");
  const auto* tail = reinterpret_cast<const Int8Tail*>(data + kInt8TailAt);
  check_activations(tail->activations, "packed weight: ");
  Int8Packed w;
  w.header = &h;
  w.activations = &tail->activations;
  // First by division: the products below cannot overflow then.
  PARED_CHECK(w.panels() == 0 || w.units() <= bytes / (w.panels() * kInt8Panel),
              "packed weight: expected a buffer of the size of its matrix, got a corrupt header");
  const uint64_t padded = w.panels() * kInt8Panel;
  check_section(h, h.values_at, w.panels() * w.panel_bytes());
  check_section(h, tail->scales_at, padded * sizeof(float));
  check_section(h, tail->compensation_at, padded * sizeof(int32_t));
  w.weights = reinterpret_cast<const int8_t*>(data + h.values_at);
  w.scales = reinterpret_cast<const float*>(data + tail->scales_at);
  w.compensation = reinterpret_cast<const int32_t*>(data + tail->compensation_at);
  return w;
}

void validate_int8(const Int8Packed& w) {
  const PackedHeader& h = *w.header;
  check_sum(h);
  const Layout layout(h);
  int64_t nnz = 0;
  for (int64_t n = 0; n < layout.panels() * kInt8Panel; ++n) {
    const int64_t row = layout.row(n);
    PARED_CHECK(std::isfinite(w.scales[n]) && w.scales[n] >= 0.0f && (row >= 0 || w.scales[n] == 0.0f),
                "packed weight: row ", row, ": invalid scale ", w.scales[n]);
    const int64_t tap_bytes = layout.words.per_tap() * kInt8Unit;
    int64_t sum = 0;
    for (int64_t b = 0; b < layout.units * kInt8Unit; ++b) {
      const int q = w.weights[layout.at(n, b)];
      PARED_CHECK(q == 0 || (row >= 0 && b % tap_bytes < layout.words.channels), "packed weight: row ", row,
                  ": invalid value ", q, " in the padding");
      sum += q;
      nnz += q != 0;
    }
    PARED_CHECK(w.compensation[n] == sum * w.activations->zero, "packed weight: row ", row,
                ": expected compensation ", sum * w.activations->zero, ", got ", w.compensation[n]);
  }
  PARED_CHECK(nnz == h.nnz, "packed weight: expected ", h.nnz, " non-zeros, got ", nnz);
}

namespace {

// Calls fn(row, element in the user's order, q, scale).
template <class F>
void for_each_element(const Int8Packed& w, F fn) {
  validate_int8(w);
  const Layout layout(*w.header);
  const int64_t cols = dense_cols(*w.header);
  for (int64_t row = 0; row < w.header->rows; ++row) {
    const int64_t place = layout.place(row);
    for (int64_t k = 0; k < cols; ++k)
      fn(row, k, w.weights[layout.at(place, layout.words.byte(k))], w.scales[place]);
  }
}

}  // namespace

void unpack_int8(const Int8Packed& w, int8_t* q, float* scales) {
  const int64_t cols = dense_cols(*w.header);
  for_each_element(w, [&](int64_t row, int64_t k, int8_t v, float) { q[row * cols + k] = v; });
  const Layout layout(*w.header);
  for (int64_t row = 0; row < w.header->rows; ++row) scales[row] = w.scales[layout.place(row)];
}

void unpack_int8_dense(const Int8Packed& w, DType dtype, void* out) {
  const int64_t cols = dense_cols(*w.header);
  for_each_element(w, [&](int64_t row, int64_t k, int8_t q, float scale) {
    const float v = static_cast<float>(q) * scale;
    const int64_t i = row * cols + k;
    store_value(out, i, dtype, v);
  });
}

}  // namespace pared
