#include "formats/int8.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "core/aligned.h"
#include "core/check.h"
#include "core/parallel.h"
#include "formats/values.h"

namespace pared {
namespace {

constexpr int64_t kPanelsPerTask = 2;

// Where q[n][k] lies.
int64_t at(int64_t n, int64_t k, int64_t units) {
  return ((n / kInt8Panel * units + k / kInt8Unit) * kInt8Panel + n % kInt8Panel) * kInt8Unit + k % kInt8Unit;
}

// The buffer around rows that row(n, scale, emit) gives: it sets the row's scale and calls emit(k, q).
template <class Row>
void write(const ActivationRange& activations, PackedHeader h, uint8_t* out, const Row& row) {
  std::memset(out, 0, h.bytes);
  const int64_t units = (h.cols + kInt8Unit - 1) / kInt8Unit;
  const int64_t panels = (h.rows + kInt8Panel - 1) / kInt8Panel;
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
    for (int64_t n = p0 * kInt8Panel; n < std::min(h.rows, p1 * kInt8Panel); ++n) {
      int64_t sum = 0;
      row(n, scales[n], [&](int64_t k, int q) {
        weights[at(n, k, units)] = static_cast<int8_t>(q);
        sum += q;
        stored += q != 0;
      });
      compensation[n] = static_cast<int32_t>(sum * activations.zero);
    }
    nnz.fetch_add(stored, std::memory_order_relaxed);
  });
  h.nnz = h.entries = nnz.load();
  seal(h, out);
}

}  // namespace

void check_activations(const ActivationRange& a) {
  if (a.scale == 0.0f) {
    PARED_CHECK(a.zero == 128 && a.low == 1 && a.high == 255,
                "activations: expected zero 128, low 1 and high 255 where they are dynamic");
    return;
  }
  PARED_CHECK(std::isfinite(a.scale) && a.scale >= FLT_MIN && a.scale <= 1 / FLT_MIN,
              "activation_scale: expected a positive, normal number up to 2^126, got ", a.scale);
  PARED_CHECK(0 <= a.low && a.low <= a.zero && a.zero <= a.high && a.high <= 255,
              "activations: expected 0 <= low <= zero <= high <= 255 as unsigned bytes, got ", a.low, ", ",
              a.zero, ", ", a.high);
}

PackedHeader plan_int8(int64_t rows, int64_t cols, DType dtype, const ActivationRange& activations) {
  PARED_CHECK(rows >= 0 && rows < kMaxSize / 2 && cols >= 0 && cols <= kInt8MaxCols,
              "weight: expected at most ", kInt8MaxCols,
              " inputs, beyond which int32 sums could overflow, got [", rows, ", ", cols, "]");
  check_activations(activations);
  PackedHeader h = new_header(PackedKind::int8, dtype, rows, cols);
  const uint64_t panels = (rows + kInt8Panel - 1) / kInt8Panel, units = (cols + kInt8Unit - 1) / kInt8Unit;
  h.values_at = round_up(kInt8TailAt + sizeof(Int8Tail), kCacheLine);
  h.bytes = h.values_at + panels * units * kInt8Panel * kInt8Unit +
            2 * round_up(panels * kInt8Panel * sizeof(float), kCacheLine);
  return h;
}

void pack_int8(const DenseView& w, const ActivationRange& activations, PackedHeader header, uint8_t* out) {
  std::atomic<int64_t> bad_row{-1};
  write(activations, header, out, [&](int64_t n, float& scale, const auto& emit) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t k = 0; k < w.cols; ++k) {
      const float v = std::fabs(value_at(w.data, n * w.row_stride + k * w.col_stride, w.dtype));
      finite = finite && v <= FLT_MAX;
      largest = std::max(largest, v);
    }
    if (!finite) bad_row.store(n, std::memory_order_relaxed);
    if (!finite || largest < kSmallestMax) return;
    scale = largest / 127.0f;
    for (int64_t k = 0; k < w.cols; ++k)
      emit(k, static_cast<int>(
                  std::lrintf(value_at(w.data, n * w.row_stride + k * w.col_stride, w.dtype) / scale)));
  });
  PARED_CHECK(bad_row.load() < 0, "weight: expected finite values, got NaN or infinity in row ",
              bad_row.load());
}

void pack_int8(const QuantizedView& w, const ActivationRange& activations, PackedHeader header,
               uint8_t* out) {
  for (int64_t n = 0; n < w.rows; ++n)
    PARED_CHECK(std::isfinite(w.scales[n]) && w.scales[n] >= 0.0f,
                "scales: expected finite numbers of at least 0, got ", w.scales[n], " for row ", n);
  write(activations, header, out, [&](int64_t n, float& scale, const auto& emit) {
    scale = w.scales[n];
    for (int64_t k = 0; k < w.cols; ++k) emit(k, w.q[n * w.row_stride + k * w.col_stride]);
  });
}

Int8Packed view_int8(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  PARED_CHECK(h.kind == PackedKind::int8, "packed weight: expected int8, got kind ",
              static_cast<int>(h.kind));
  PARED_CHECK(bytes >= static_cast<int64_t>(kInt8TailAt + sizeof(Int8Tail)) && h.cols <= kInt8MaxCols &&
                  h.rows < kMaxSize / 2 && h.kh == 0 && h.nnz >= 0,
              "packed weight: expected a valid header, got a corrupt one");
  const auto* tail = reinterpret_cast<const Int8Tail*>(data + kInt8TailAt);
  check_activations(tail->activations);
  Int8Packed w;
  w.header = &h;
  w.activations = &tail->activations;
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
  const int64_t units = w.units();
  int64_t nnz = 0;
  for (int64_t n = 0; n < w.panels() * kInt8Panel; ++n) {
    const bool real = n < h.rows;
    PARED_CHECK(std::isfinite(w.scales[n]) && w.scales[n] >= 0.0f && (real || w.scales[n] == 0.0f),
                "packed weight: row ", n, ": invalid scale ", w.scales[n]);
    int64_t sum = 0;
    for (int64_t k = 0; k < units * kInt8Unit; ++k) {
      const int q = w.weights[at(n, k, units)];
      PARED_CHECK(q == 0 || (real && k < h.cols), "packed weight: row ", n, ": invalid value ", q,
                  " in the padding");
      sum += q;
      nnz += q != 0;
    }
    PARED_CHECK(w.compensation[n] == sum * w.activations->zero, "packed weight: row ", n,
                ": expected compensation ", sum * w.activations->zero, ", got ", w.compensation[n]);
  }
  PARED_CHECK(nnz == h.nnz, "packed weight: expected ", h.nnz, " non-zeros, got ", nnz);
}

void unpack_int8(const Int8Packed& w, int8_t* q, float* scales) {
  validate_int8(w);
  const PackedHeader& h = *w.header;
  for (int64_t n = 0; n < h.rows; ++n)
    for (int64_t k = 0; k < h.cols; ++k) q[n * h.cols + k] = w.weights[at(n, k, w.units())];
  std::copy_n(w.scales, h.rows, scales);
}

void unpack_int8_dense(const Int8Packed& w, DType dtype, void* out) {
  validate_int8(w);
  const PackedHeader& h = *w.header;
  for (int64_t n = 0; n < h.rows; ++n)
    for (int64_t k = 0; k < h.cols; ++k) {
      const float v = static_cast<float>(w.weights[at(n, k, w.units())]) * w.scales[n];
      const int64_t i = n * h.cols + k;
      if (dtype == DType::f32) static_cast<float*>(out)[i] = v;
      else static_cast<uint16_t*>(out)[i] = dtype == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
    }
}

}  // namespace pared
