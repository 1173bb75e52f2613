#include "formats/int4.h"

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

constexpr int64_t kPerVector = 2 * kInt8Unit;

// Byte and shift of q[n][k] within its panel.
struct Place {
  int64_t byte;
  int shift;
};
Place place(const Int4Packed& w, int64_t n, int64_t k) {
  const int64_t in_group = k % w.group;
  return {k / w.group * w.group_bytes() + 64 + in_group / kPerVector * 64 + n % kInt8Panel * kInt8Unit +
              in_group % kInt8Unit,
          in_group % kPerVector < kInt8Unit ? 0 : 4};
}

int nibble(const Int4Packed& w, int64_t n, int64_t k) {
  const Place p = place(w, n, k);
  return (w.weights[n / kInt8Panel * w.panel_bytes() + p.byte] >> p.shift & 15) - 8;
}

float scale_at(const Int4Packed& w, int64_t n, int64_t g) {
  float s;
  std::memcpy(&s,
              w.weights + n / kInt8Panel * w.panel_bytes() + g * w.group_bytes() +
                  n % kInt8Panel * static_cast<int64_t>(sizeof(float)),
              sizeof(s));
  return s;
}

// The buffer around groups that group(n, g, q) gives: it fills q[0 ... group) and returns the scale.
template <class Group>
void write(int32_t group, PackedHeader h, uint8_t* out, const Group& fill) {
  std::memset(out, 0, h.values_at);
  std::memcpy(out + kInt4GroupAt, &group, sizeof(group));
  uint8_t* weights = out + h.values_at;
  const Int4Packed w{&h, group, weights};
  std::atomic<int64_t> nnz{0};
  parallel_for(0, w.panels(), 1, [&](int64_t p0, int64_t p1) {
    int64_t stored = 0;
    int8_t q[128];
    for (int64_t p = p0; p < p1; ++p) {
      uint8_t* panel = weights + p * w.panel_bytes();
      std::memset(panel, 0, w.panel_bytes());
      for (int64_t n = p * kInt8Panel; n < (p + 1) * kInt8Panel; ++n)
        for (int64_t g = 0; g < w.groups(); ++g) {
          std::memset(q, 0, sizeof(q));
          const float scale = n < h.rows ? fill(n, g, q) : 0.0f;
          std::memcpy(panel + g * w.group_bytes() + n % kInt8Panel * sizeof(float), &scale, sizeof(scale));
          for (int64_t k = 0; k < group; ++k) {
            const Place at = place(w, n, g * group + k);
            panel[at.byte] |= static_cast<uint8_t>((q[k] + 8) << at.shift);
            stored += q[k] != 0;
          }
        }
    }
    nnz.fetch_add(stored, std::memory_order_relaxed);
  });
  std::memset(weights + w.panels() * w.panel_bytes(), 0,
              h.bytes - h.values_at - w.panels() * w.panel_bytes());
  h.nnz = h.entries = nnz.load();
  seal(h, out);
}

bool group_known(int32_t group) { return group == 32 || group == 64 || group == 128; }

}  // namespace

PackedHeader plan_int4(int64_t rows, int64_t cols, DType dtype, int32_t group) {
  PARED_CHECK(rows >= 0 && rows < kMaxSize / kInt4MaxCols && cols >= 0 && cols <= kInt4MaxCols,
              "weight: expected at most ", kInt4MaxCols, " inputs, got [", rows, ", ", cols, "]");
  PARED_CHECK(group_known(group), "group: expected 32, 64 or 128, got ", group);
  PackedHeader h = new_header(PackedKind::int4, dtype, rows, cols);
  h.values_at = round_up(kInt4GroupAt + sizeof(group), kCacheLine);
  const Int4Packed w{&h, group, nullptr};
  h.bytes = h.values_at + w.panels() * w.panel_bytes();
  return h;
}

void pack_int4(const DenseView& w, int32_t group, PackedHeader header, uint8_t* out) {
  std::atomic<int64_t> bad_row{-1};
  write(group, header, out, [&](int64_t n, int64_t g, int8_t* q) {
    const int64_t end = std::min<int64_t>(w.cols, (g + 1) * group);
    const auto value = [&](int64_t k) {
      return value_at(w.data, n * w.row_stride + k * w.col_stride, w.dtype);
    };
    float largest = 0.0f;
    bool finite = true;
    for (int64_t k = g * group; k < end; ++k) {
      finite = finite && std::fabs(value(k)) <= FLT_MAX;
      largest = std::max(largest, std::fabs(value(k)));
    }
    if (!finite) bad_row.store(n, std::memory_order_relaxed);
    if (!finite || largest < kSmallestMax) return 0.0f;
    const float scale = largest / 7.0f;
    for (int64_t k = g * group; k < end; ++k)
      q[k - g * group] = static_cast<int8_t>(std::lrintf(value(k) / scale));
    return scale;
  });
  PARED_CHECK(bad_row.load() < 0, "weight: expected finite values, got NaN or infinity in row ",
              bad_row.load());
}

void pack_int4(const Int4View& w, int32_t group, PackedHeader header, uint8_t* out) {
  const int64_t groups = (w.cols + group - 1) / group;
  for (int64_t i = 0; i < w.rows * w.cols; ++i)
    PARED_CHECK(w.q[i] >= -8 && w.q[i] <= 7, "q: expected integers from -8 to 7, got ", int{w.q[i]});
  for (int64_t i = 0; i < w.rows * groups; ++i)
    PARED_CHECK(std::isfinite(w.scales[i]) && w.scales[i] >= 0.0f,
                "scales: expected finite numbers of at least 0, got ", w.scales[i]);
  write(group, header, out, [&](int64_t n, int64_t g, int8_t* q) {
    std::copy_n(w.q + n * w.cols + g * group, std::min<int64_t>(group, w.cols - g * group), q);
    return w.scales[n * groups + g];
  });
}

Int4Packed view_int4(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  PARED_CHECK(h.kind == PackedKind::int4, "packed weight: expected int4, got kind ",
              static_cast<int>(h.kind));
  Int4Packed w{&h, 0, nullptr};
  PARED_CHECK(bytes >= static_cast<int64_t>(kInt4GroupAt + sizeof(w.group)) && h.cols <= kInt4MaxCols &&
                  h.rows < kMaxSize / kInt4MaxCols && h.kh == 0 && h.nnz >= 0,
              "packed weight: expected a valid header, got a corrupt one");
  std::memcpy(&w.group, data + kInt4GroupAt, sizeof(w.group));
  PARED_CHECK(group_known(w.group), "packed weight: expected a valid header, got a corrupt one");
  check_section(h, h.values_at, w.panels() * w.panel_bytes());
  w.weights = data + h.values_at;  // a damaged offset would leave the address space
  return w;
}

void validate_int4(const Int4Packed& w) {
  const PackedHeader& h = *w.header;
  check_sum(h);
  int64_t nnz = 0;
  for (int64_t n = 0; n < w.panels() * kInt8Panel; ++n)
    for (int64_t g = 0; g < w.groups(); ++g) {
      const float s = scale_at(w, n, g);
      PARED_CHECK(std::isfinite(s) && s >= 0.0f && (n < h.rows || s == 0.0f), "packed weight: row ", n,
                  ": invalid scale ", s);
      for (int64_t k = g * w.group; k < (g + 1) * w.group; ++k) {
        const int q = nibble(w, n, k);
        PARED_CHECK(q == 0 || (n < h.rows && k < h.cols), "packed weight: row ", n, ": invalid value ", q,
                    " in the padding");
        nnz += q != 0;
      }
    }
  PARED_CHECK(nnz == h.nnz, "packed weight: expected ", h.nnz, " non-zeros, got ", nnz);
}

void unpack_int4(const Int4Packed& w, int8_t* q, float* scales) {
  validate_int4(w);
  const PackedHeader& h = *w.header;
  for (int64_t n = 0; n < h.rows; ++n) {
    for (int64_t k = 0; k < h.cols; ++k) q[n * h.cols + k] = static_cast<int8_t>(nibble(w, n, k));
    for (int64_t g = 0; g < w.groups(); ++g) scales[n * w.groups() + g] = scale_at(w, n, g);
  }
}

void unpack_int4_dense(const Int4Packed& w, DType dtype, void* out) {
  validate_int4(w);
  const PackedHeader& h = *w.header;
  for (int64_t n = 0; n < h.rows; ++n)
    for (int64_t k = 0; k < h.cols; ++k) {
      const float v = static_cast<float>(nibble(w, n, k)) * scale_at(w, n, k / w.group);
      const int64_t i = n * h.cols + k;
      store_value(out, i, dtype, v);
    }
}

}  // namespace pared
