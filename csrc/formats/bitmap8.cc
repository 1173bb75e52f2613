#include "formats/bitmap8.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/aligned.h"
#include "core/check.h"
#include "core/parallel.h"
#include "formats/values.h"

namespace pared {
namespace {

constexpr int kVectorBytes = kInt8Panel * kInt8Unit;
constexpr int64_t kGroupsPerTask = 4;

// Calls fn(cell, group, block) for every cell, in the order of the format.
template <class F>
void for_cells(const BitmapShape& s, F fn) {
  int64_t cell = 0;
  for (int64_t first = 0; first < s.groups(); first += kBitmapPass)
    for (int64_t b = 0; b < s.blocks(); ++b)
      for (int64_t g = first; g < first + s.groups_in(first); ++g) fn(cell++, g, b);
}

// The same from several threads, a group's cells from one.
template <class F>
void for_cells_in_parallel(const BitmapShape& s, const F& fn) {
  parallel_for(0, s.groups(), kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g)
      for (int64_t b = 0; b < s.blocks(); ++b) fn(s.cell(g, b), g, b);
  });
}

// The weight a panel at a time, from several threads: fn(group, bytes, scales, compensation) with the group's
// vectors behind each other, as the dense format has them.
template <class F>
void for_panels(const Int8Source& w, const Bitmap8Plan& plan, const BitmapShape& s, const F& fn) {
  parallel_for(0, s.groups(), kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    std::vector<int8_t> bytes(int8_words(plan.dense).per_row() * kVectorBytes);
    float scales[kInt8Panel];
    int32_t compensation[kInt8Panel];
    for (int64_t g = g0; g < g1; ++g) {
      quantize_panel(w, plan.dense, plan.activations, g, bytes.data(), scales, compensation);
      fn(g, bytes, scales, compensation);
    }
  });
}

// The bytes of a K block.
struct Bytes {
  const int8_t *begin, *end;
};
Bytes block_bytes(const std::vector<int8_t>& bytes, const BitmapShape& s, int64_t block) {
  const auto all = static_cast<int64_t>(bytes.size());
  return {bytes.data() + block * s.block_k * kVectorBytes,
          bytes.data() + std::min(all, (block + 1) * s.block_k * kVectorBytes)};
}

// Calls fn(row, column, q) for every stored element of a cell. The structure has been validated.
template <class F>
void for_elements(const Bitmap8Packed& w, const BitmapShape& s, int64_t cell, int64_t group, int64_t block,
                  F fn) {
  const int8_t* value = w.values + w.starts[cell];
  const uint64_t* masks = w.masks + s.first_vector(group, block);
  for (int64_t v = 0; v < s.vectors_in(block); ++v)
    for (uint64_t mask = masks[v]; mask; mask &= mask - 1) {
      const int bit = __builtin_ctzll(mask);
      fn(group * kInt8Panel + bit / kInt8Unit, (block * s.block_k + v) * kInt8Unit + bit % kInt8Unit,
         *value++);
    }
}

}  // namespace

Bitmap8Plan plan_bitmap8(const Int8Source& w, const PackedHeader& dense, const ActivationRange& activations) {
  Bitmap8Plan plan{};
  plan.dense = dense;
  plan.activations = activations;
  PackedHeader& h = plan.header;
  h = new_header(PackedKind::bitmap8, dense.dtype, dense.rows, dense.cols);
  h.entry_rows = kBitmapLanes;
  h.block_k = kBitmap8Block;
  const BitmapShape s{h.rows, h.cols, kInt8Unit, kBitmap8Block};
  plan.starts.assign(s.groups() * s.blocks() + 1, 0);
  std::atomic<int64_t> nnz{0};
  for_panels(w, plan, s, [&](int64_t g, const std::vector<int8_t>& bytes, const float*, const int32_t*) {
    int64_t stored = 0;
    for (int64_t b = 0; b < s.blocks(); ++b) {
      const Bytes q = block_bytes(bytes, s, b);
      const auto count = (q.end - q.begin) - std::count(q.begin, q.end, int8_t{0});
      plan.starts[s.cell(g, b)] = static_cast<uint32_t>(count);
      stored += count;
    }
    nnz.fetch_add(stored, std::memory_order_relaxed);
  });
  h.nnz = h.entries = nnz.load();
  PARED_CHECK(h.nnz < kBitmapMaxNonZeros, "weight: expected fewer than 2^32 non-zeros, got ", h.nnz);
  uint32_t at = 0;
  for (uint32_t& start : plan.starts) {
    const uint32_t count = start;
    start = at;
    at += count;
  }
  size_t end = kInt8TailAt + sizeof(Int8Tail);
  const auto section = [&end](size_t bytes) {
    const size_t begin = round_up(end, kCacheLine);
    end = begin + bytes;
    return begin;
  };
  h.starts_at = section(plan.starts.size() * sizeof(uint32_t));
  h.counts_at = section(s.groups() * s.vectors() * sizeof(uint64_t));
  plan.scales_at = section(s.groups() * kInt8Panel * sizeof(float));
  plan.compensation_at = section(s.groups() * kInt8Panel * sizeof(int32_t));
  h.values_at = section(h.nnz + kBitmapSlack);
  h.bytes = round_up(end, kCacheLine);
  return plan;
}

void pack_bitmap8(const Int8Source& w, const Bitmap8Plan& plan, uint8_t* out) {
  const PackedHeader& h = plan.header;
  const BitmapShape s{h.rows, h.cols, kInt8Unit, kBitmap8Block};
  std::memset(out, 0, h.values_at);
  std::memset(out + h.values_at + h.nnz, 0, h.bytes - (h.values_at + h.nnz));
  const Int8Tail tail{plan.scales_at, plan.compensation_at, plan.activations};
  std::memcpy(out + kInt8TailAt, &tail, sizeof(tail));
  std::copy(plan.starts.begin(), plan.starts.end(), reinterpret_cast<uint32_t*>(out + h.starts_at));
  auto* masks = reinterpret_cast<uint64_t*>(out + h.counts_at);
  auto* values = reinterpret_cast<int8_t*>(out + h.values_at);
  for_panels(
      w, plan, s, [&](int64_t g, const std::vector<int8_t>& bytes, const float* scales, const int32_t* sums) {
        std::copy_n(scales, kInt8Panel, reinterpret_cast<float*>(out + plan.scales_at) + g * kInt8Panel);
        std::copy_n(sums, kInt8Panel,
                    reinterpret_cast<int32_t*>(out + plan.compensation_at) + g * kInt8Panel);
        for (int64_t b = 0; b < s.blocks(); ++b) {
          int8_t* to = values + plan.starts[s.cell(g, b)];
          uint64_t* mask = masks + s.first_vector(g, b);
          const Bytes q = block_bytes(bytes, s, b);
          for (const int8_t* v = q.begin; v != q.end; v += kVectorBytes, ++mask)
            for (int i = 0; i < kVectorBytes; ++i)
              if (v[i] != 0) {
                *mask |= uint64_t{1} << i;
                *to++ = v[i];
              }
        }
      });
  seal(h, out);
}

Bitmap8Packed view_bitmap8(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  PARED_CHECK(h.kind == PackedKind::bitmap8, "packed weight: expected an int8 bitmap, got kind ",
              static_cast<int>(h.kind));
  const bool linear = h.channels == 0 && h.kh == 0 && h.kw == 0 && h.groups == 0;
  PARED_CHECK(linear && bytes >= static_cast<int64_t>(kInt8TailAt + sizeof(Int8Tail)) &&
                  h.cols <= kInt8MaxCols && h.nnz >= 0 && h.nnz < kBitmapMaxNonZeros && h.entries == h.nnz &&
                  h.entry_rows == kBitmapLanes && h.block_k == kBitmap8Block && h.tile == 0,
              "packed weight: expected a valid header, got a corrupt one");
  const auto* tail = reinterpret_cast<const Int8Tail*>(data + kInt8TailAt);
  check_activations(tail->activations, "packed weight: ");
  Bitmap8Packed w;
  w.header = &h;
  w.activations = &tail->activations;
  const BitmapShape s = w.shape();
  // First by division: the products below cannot overflow then.
  PARED_CHECK(s.groups() <= bytes && (s.groups() == 0 || s.vectors() <= bytes / s.groups()),
              "packed weight: expected a buffer of the size of its matrix, got a corrupt header");
  check_section(h, h.starts_at, (s.groups() * s.blocks() + 1) * sizeof(uint32_t));
  check_section(h, h.counts_at, s.groups() * s.vectors() * sizeof(uint64_t));
  check_section(h, h.values_at, h.nnz + kBitmapSlack);
  check_section(h, tail->scales_at, s.groups() * kInt8Panel * sizeof(float));
  check_section(h, tail->compensation_at, s.groups() * kInt8Panel * sizeof(int32_t));
  w.starts = reinterpret_cast<const uint32_t*>(data + h.starts_at);
  w.masks = reinterpret_cast<const uint64_t*>(data + h.counts_at);
  w.values = reinterpret_cast<const int8_t*>(data + h.values_at);
  w.scales = reinterpret_cast<const float*>(data + tail->scales_at);
  w.compensation = reinterpret_cast<const int32_t*>(data + tail->compensation_at);
  return w;
}

void validate_bitmap8(const Bitmap8Packed& w) {
  const PackedHeader& h = *w.header;
  check_sum(h);
  const BitmapShape s = w.shape();
  std::vector<int64_t> sums(s.groups() * kInt8Panel, 0);
  int64_t at = 0;
  for_cells(s, [&](int64_t cell, int64_t g, int64_t b) {
    PARED_CHECK(w.starts[cell] == at, "packed weight: row group ", g, " block ", b, ": expected start ", at,
                ", got ", w.starts[cell]);
    const uint64_t* masks = w.masks + s.first_vector(g, b);
    for (int64_t v = 0; v < s.vectors_in(b); ++v) at += __builtin_popcountll(masks[v]);
    PARED_CHECK(at <= h.nnz, "packed weight: row group ", g, ": the masks exceed ", h.nnz, " non-zeros");
    for_elements(w, s, cell, g, b, [&](int64_t row, int64_t column, int q) {
      PARED_CHECK(row < h.rows && column < h.cols, "packed weight: row group ", g,
                  ": expected masks inside the matrix, got bits beyond");
      PARED_CHECK(q != 0, "packed weight: row ", row, ": invalid value 0");
      sums[row] += q;
    });
  });
  PARED_CHECK(at == h.nnz && w.starts[s.groups() * s.blocks()] == at, "packed weight: expected ", h.nnz,
              " non-zeros, got ", at);
  for (int64_t n = 0; n < s.groups() * kInt8Panel; ++n) {
    PARED_CHECK(std::isfinite(w.scales[n]) && w.scales[n] >= 0.0f && (n < h.rows || w.scales[n] == 0.0f),
                "packed weight: row ", n, ": invalid scale ", w.scales[n]);
    PARED_CHECK(w.compensation[n] == sums[n] * w.activations->zero, "packed weight: row ", n,
                ": expected compensation ", sums[n] * w.activations->zero, ", got ", w.compensation[n]);
  }
}

void unpack_bitmap8(const Bitmap8Packed& w, int8_t* q, float* scales) {
  validate_bitmap8(w);
  const PackedHeader& h = *w.header;
  const BitmapShape s = w.shape();
  std::fill_n(q, h.rows * h.cols, int8_t{0});
  for_cells_in_parallel(s, [&](int64_t cell, int64_t g, int64_t b) {
    for_elements(w, s, cell, g, b,
                 [&](int64_t row, int64_t column, int8_t v) { q[row * h.cols + column] = v; });
  });
  std::copy_n(w.scales, h.rows, scales);
}

void unpack_bitmap8_dense(const Bitmap8Packed& w, DType dtype, void* out) {
  validate_bitmap8(w);
  const PackedHeader& h = *w.header;
  const BitmapShape s = w.shape();
  std::fill_n(static_cast<uint8_t*>(out), h.rows * h.cols * dtype_size(dtype), uint8_t{0});
  for_cells_in_parallel(s, [&](int64_t cell, int64_t g, int64_t b) {
    for_elements(w, s, cell, g, b, [&](int64_t row, int64_t column, int8_t q) {
      const float v = static_cast<float>(q) * w.scales[row];
      const int64_t i = row * h.cols + column;
      store_value(out, i, dtype, v);
    });
  });
}

}  // namespace pared
