#include "formats/bitmap.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "core/aligned.h"
#include "core/check.h"
#include "core/parallel.h"
#include "formats/values.h"

namespace pared {
namespace {

constexpr int64_t kGroupsPerTask = 4;

bool bit(const uint8_t* mask, int i) { return mask[i >> 3] >> (i & 7) & 1; }

// Calls fn(row, column, bit) for every place of a vector that lies in the matrix, by ascending bit.
template <class F>
void for_vector(const BitmapShape& s, int64_t group, int64_t vector, F fn) {
  const int rows = static_cast<int>(std::min<int64_t>(kBitmapLanes, s.rows - group * kBitmapLanes));
  const int depth = static_cast<int>(std::min<int64_t>(s.depth, s.cols - vector * s.depth));
  for (int o = 0; o < rows; ++o)
    for (int d = 0; d < depth; ++d) fn(group * kBitmapLanes + o, vector * s.depth + d, o * s.depth + d);
}

// Calls fn(vector of the matrix, its index in the masks) for the vectors of a cell, in order.
template <class F>
void for_cell(const BitmapShape& s, int64_t group, int64_t block, F fn) {
  const int64_t first = s.first_vector(group, block);
  for (int64_t v = 0; v < s.vectors_in(block); ++v) fn(block * s.block_k + v, first + v);
}

int64_t mask_bytes(const BitmapShape& s) { return s.groups() * s.vectors() * 2 * s.depth; }

}  // namespace

BitmapPlan plan_bitmap(const DenseView& w) {
  PARED_CHECK(w.rows >= 0 && w.rows < kMaxSize && w.cols >= 0 && w.cols < kMaxSize,
              "weight: expected sizes from 0 to 2^48, got [", w.rows, ", ", w.cols, "]");
  BitmapPlan plan{};
  PackedHeader& h = plan.header;
  h = new_header(PackedKind::bitmap, w.dtype, w.rows, w.cols);
  h.entry_rows = kBitmapLanes;
  h.block_k = kBitmapBlock / bitmap_depth(w.dtype);
  const BitmapShape s = bitmap_shape(h);
  plan.masks.assign(mask_bytes(s), 0);
  plan.starts.assign(s.groups() * s.blocks() + 1, 0);
  std::atomic<int64_t> bad_row{-1};
  parallel_for(0, s.groups(), kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g)
      for (int64_t b = 0; b < s.blocks(); ++b) {
        uint32_t count = 0;
        for_cell(s, g, b, [&](int64_t vector, int64_t at) {
          uint8_t* mask = &plan.masks[at * 2 * s.depth];
          for_vector(s, g, vector, [&](int64_t r, int64_t c, int i) {
            const float v = value_at(w.data, r * w.row_stride + c * w.col_stride, w.dtype);
            if (!std::isfinite(v)) bad_row.store(r, std::memory_order_relaxed);
            if (!is_stored(v)) return;
            mask[i >> 3] = static_cast<uint8_t>(mask[i >> 3] | 1u << (i & 7));
            ++count;
          });
        });
        plan.starts[s.cell(g, b)] = count;
      }
  });
  PARED_CHECK(bad_row.load() < 0, "weight: expected finite values, got NaN or infinity in row ",
              bad_row.load());
  int64_t at = 0;
  for (uint32_t& start : plan.starts) {
    const int64_t count = start;
    start = static_cast<uint32_t>(at);
    at += count;
  }
  PARED_CHECK(at < kBitmapMaxNonZeros, "weight: expected fewer than 2^32 non-zeros, got ", at);
  h.nnz = h.entries = at;

  h.starts_at = round_up(sizeof(PackedHeader), kCacheLine);
  h.counts_at = round_up(h.starts_at + plan.starts.size() * sizeof(uint32_t), kCacheLine);
  h.values_at = round_up(h.counts_at + plan.masks.size(), kCacheLine);
  h.bytes = round_up(h.values_at + h.nnz * dtype_size(bitmap_values(h.dtype)) + kBitmapSlack, kCacheLine);
  return plan;
}

void pack_bitmap(const DenseView& w, const BitmapPlan& plan, uint8_t* out) {
  const PackedHeader& h = plan.header;
  const BitmapShape s = bitmap_shape(h);
  std::memset(out, 0, h.values_at);
  std::copy(plan.starts.begin(), plan.starts.end(), reinterpret_cast<uint32_t*>(out + h.starts_at));
  std::copy(plan.masks.begin(), plan.masks.end(), out + h.counts_at);
  uint8_t* const values = out + h.values_at;
  const DType stored = bitmap_values(h.dtype);
  const int64_t element = dtype_size(stored);
  // Slack and padding are part of the checksum.
  std::memset(values + h.nnz * element, 0, h.bytes - (h.values_at + h.nnz * element));
  parallel_for(0, s.groups(), kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g)
      for (int64_t b = 0; b < s.blocks(); ++b) {
        int64_t to = plan.starts[s.cell(g, b)];
        for_cell(s, g, b, [&](int64_t vector, int64_t at) {
          const uint8_t* mask = &plan.masks[at * 2 * s.depth];
          for_vector(s, g, vector, [&](int64_t r, int64_t c, int i) {
            const int64_t from = r * w.row_stride + c * w.col_stride;
            if (bit(mask, i)) store_value(values, to++, stored, value_at(w.data, from, w.dtype));
          });
        });
      }
  });
  seal(h, out);
}

BitmapPacked view_bitmap(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  PARED_CHECK(h.kind == PackedKind::bitmap, "packed weight: expected a bitmap, got kind ",
              static_cast<int>(h.kind));
  const bool linear = h.channels == 0 && h.kh == 0 && h.kw == 0 && h.groups == 0;
  PARED_CHECK(linear && h.nnz >= 0 && h.nnz < kBitmapMaxNonZeros && h.entries == h.nnz &&
                  h.entry_rows == kBitmapLanes && h.block_k * bitmap_depth(h.dtype) == kBitmapBlock &&
                  h.tile == 0,
              "packed weight: expected a valid header, got a corrupt one");
  BitmapPacked w;
  w.header = &h;
  const BitmapShape s = w.shape();
  // First by division: the products below cannot overflow then.
  PARED_CHECK(s.groups() == 0 || s.vectors() <= bytes / s.groups(),
              "packed weight: expected a buffer of the size of its matrix, got a corrupt header");
  check_section(h, h.starts_at, (s.groups() * s.blocks() + 1) * sizeof(uint32_t));
  check_section(h, h.counts_at, mask_bytes(s));
  check_section(h, h.values_at, h.nnz * dtype_size(bitmap_values(h.dtype)) + kBitmapSlack);
  w.starts = reinterpret_cast<const uint32_t*>(data + h.starts_at);
  w.masks = data + h.counts_at;
  w.values = data + h.values_at;
  return w;
}

void validate_bitmap(const BitmapPacked& w) {
  const PackedHeader& h = *w.header;
  check_sum(h);
  const BitmapShape s = w.shape();
  int64_t at = 0;
  for (int64_t first = 0; first < s.groups(); first += kBitmapPass)
    for (int64_t b = 0; b < s.blocks(); ++b)
      for (int64_t g = first; g < first + s.groups_in(first); ++g) {
        PARED_CHECK(w.starts[s.cell(g, b)] == at, "packed weight: row group ", g, " block ", b,
                    ": expected start ", at, ", got ", w.starts[s.cell(g, b)]);
        for_cell(s, g, b, [&](int64_t vector, int64_t index) {
          const uint8_t* mask = w.masks + index * 2 * s.depth;
          int outside = 0;
          for (int i = 0; i < kBitmapLanes * s.depth; ++i) outside += bit(mask, i);
          for_vector(s, g, vector, [&](int64_t r, int64_t c, int i) {
            if (!bit(mask, i)) return;
            --outside;
            PARED_CHECK(at < h.nnz, "packed weight: row ", r, ": the masks exceed ", h.nnz, " non-zeros");
            const float v = value_at(w.values, at++, bitmap_values(h.dtype));
            PARED_CHECK(is_stored(v) && std::isfinite(v), "packed weight: row ", r, ": invalid value ", v);
          });
          PARED_CHECK(outside == 0, "packed weight: row group ", g,
                      ": expected masks inside the matrix, got bits beyond");
        });
      }
  PARED_CHECK(at == h.nnz && w.starts[s.groups() * s.blocks()] == at, "packed weight: expected ", h.nnz,
              " non-zeros, got ", at);
}

void unpack_bitmap_dense(const BitmapPacked& w, DType dtype, void* out) {
  validate_bitmap(w);
  const BitmapShape s = w.shape();
  parallel_for(0, s.groups(), kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g)
      for (int64_t b = 0; b < s.blocks(); ++b) {
        int64_t from = w.starts[s.cell(g, b)];
        for_cell(s, g, b, [&](int64_t vector, int64_t at) {
          const uint8_t* mask = w.masks + at * 2 * s.depth;
          for_vector(s, g, vector, [&](int64_t r, int64_t c, int i) {
            const float v = bit(mask, i) ? value_at(w.values, from++, bitmap_values(w.header->dtype)) : 0.0f;
            store_value(out, r * s.cols + c, dtype, v);
          });
        });
      }
  });
}

}  // namespace pared
