// Selections with a structure: k of every row, n of every m inputs, whole blocks.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "core/check.h"
#include "core/float_mode.h"
#include "core/parallel.h"
#include "ops/topk.h"
#include "ops/topk_keys.h"

namespace pared {
namespace {

// Longer rows are selections of their own, on all threads; shorter ones stay in L2 and share the threads out.
constexpr int64_t kLongRow = 1 << 18;
// Elements that are worth a thread's start.
constexpr int64_t kMinElements = 1 << 15;

SelectRun row_run(const SelectRows& m, int64_t row) {
  const char* g = static_cast<const char*>(m.g);
  return {static_cast<const char*>(m.w) + row * m.stride * dtype_size(m.dtype),
          g ? g + row * m.g_stride * dtype_size(m.g_dtype) : nullptr,
          m.cols,
          m.dtype,
          m.g_dtype,
          m.key};
}

// Calls fn(first row, last row) on all threads.
template <class F>
void for_rows(int64_t rows, int64_t cols, F fn) {
  parallel_for(0, rows, std::max<int64_t>(1, kMinElements / std::max<int64_t>(cols, 1)),
               [&](int64_t r0, int64_t r1) {
                 const IeeeDenormals mode;
                 fn(r0, r1);
               });
}

void check_nans(const NanRule& nan, int64_t nans) {
  PARED_CHECK(!nan.raise || nans == 0, nan.argument, ": expected no NaN among the keys, got ", nans,
              " (nan=\"lowest\" ranks them below every number)");
}

KeySelect& key_select() {
  thread_local KeySelect select;
  return select;
}

// The mask of the k largest of n keys.
void mask_keys(const SelectKernels& kernels, const int32_t* keys, int64_t n, int64_t k, uint8_t* mask) {
  if (k == 0) {
    std::memset(mask, 0, n);
    return;
  }
  const Ranked r = key_select()(kernels, keys, n, k);
  kernels.mask({raw_run(keys, n), r.key, k - r.above, false, mask});
}

}  // namespace

void select_mask_rows(const SelectRows& m, int64_t k, const NanRule& nan, uint8_t* mask) {
  PARED_CHECK(k >= 0 && k <= m.cols, "k: expected 0 to ", m.cols, " (the length of a row), got ", k);
  if (m.cols > kLongRow) {
    for (int64_t r = 0; r < m.rows; ++r) {
      const SelectRun run = row_run(m, r);
      uint8_t* row_mask = mask + r * m.cols;
      select_mask_global({{run.w, m.cols, m.dtype, m.key, run.g, 0, m.g_dtype}}, k, nan, &row_mask);
    }
    return;
  }
  const SelectKernels kernels(active_isa());
  std::atomic<int64_t> nans{0};
  for_rows(m.rows, m.cols, [&](int64_t r0, int64_t r1) {
    thread_local Scratch memory;
    int32_t* const keys = memory.get<int32_t>(m.cols);
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t n = kernels.keys(row_run(m, r), keys);
      if (n) nans.fetch_add(n, std::memory_order_relaxed);
      mask_keys(kernels, keys, m.cols, k, mask + r * m.cols);
    }
  });
  check_nans(nan, nans.load());
}

void select_mask_groups(const SelectRows& matrix, int64_t taps, int64_t n, int64_t m, const NanRule& nan,
                        uint8_t* mask) {
  const SelectKernels kernels(active_isa());
  const auto group = kernel_for<select_group>(active_isa()).fn;
  const int64_t cols = matrix.cols, channels = cols / taps;
  std::atomic<int64_t> nans{0};
  const auto mask_channels = [&](const int32_t* keys, uint8_t* out) {
    if (m <= kSelectMaxGroup) {
      group({keys, channels, static_cast<int32_t>(n), static_cast<int32_t>(m), out});
      return;
    }
    for (int64_t c = 0; c < channels; c += m) {
      const int64_t left = std::min(m, channels - c);
      mask_keys(kernels, keys + c, left, std::min(n, left), out + c);
    }
  };
  for_rows(matrix.rows, cols, [&](int64_t r0, int64_t r1) {
    thread_local Scratch key_memory, tap_memory, mask_memory;
    int32_t* const keys = key_memory.get<int32_t>(cols);
    int32_t* const by_tap = tap_memory.get<int32_t>(cols);
    uint8_t* const tap_mask = mask_memory.get<uint8_t>(channels);
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t found = kernels.keys(row_run(matrix, r), keys);
      if (found) nans.fetch_add(found, std::memory_order_relaxed);
      uint8_t* const out = mask + r * cols;
      if (taps == 1) {
        mask_channels(keys, out);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t) by_tap[t * channels + c] = keys[c * taps + t];
      for (int64_t t = 0; t < taps; ++t) {
        mask_channels(by_tap + t * channels, tap_mask);
        for (int64_t c = 0; c < channels; ++c) out[c * taps + t] = tap_mask[c];
      }
    }
  });
  check_nans(nan, nans.load());
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[b] = sums[b * C] + sums[b * C + 1] + ..., left to right. C == 0: the width is `c`.
template <int C>
void add_across(const float* sums, int64_t blocks, int64_t c, float* out) {
  const int64_t width = C ? C : c;
  for (int64_t b = 0; b < blocks; ++b) {
    float s = sums[b * width];
    for (int64_t j = 1; j < width; ++j) s += sums[b * width + j];
    out[b] = s;
  }
}

}  // namespace

int64_t block_count(const SelectRows& matrix, const BlockShape& block) {
  return ceil_div(matrix.rows, block.r) * block.taps * ceil_div(matrix.cols / block.taps, block.c);
}

void block_scores(const SelectRows& matrix, const BlockShape& block, float* scores) {
  const auto sum = kernel_for<select_sum>(active_isa()).fn;
  const int64_t cols = matrix.cols, taps = block.taps, channels = cols / taps, c = block.c;
  const int64_t across = ceil_div(channels, c), whole = channels / c;
  for_rows(ceil_div(matrix.rows, block.r), cols * block.r, [&](int64_t b0, int64_t b1) {
    thread_local Scratch memory;
    float* const sums = memory.get<float>(cols);
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t row = b * block.r;
      sum({row_run(matrix, row), std::min(block.r, matrix.rows - row),
           matrix.stride * dtype_size(matrix.dtype), matrix.g_stride * dtype_size(matrix.g_dtype), sums});
      float* const out = scores + b * taps * across;
      if (taps == 1) {
        switch (c) {
          case 1: add_across<1>(sums, whole, c, out); break;
          case 2: add_across<2>(sums, whole, c, out); break;
          case 4: add_across<4>(sums, whole, c, out); break;
          case 8: add_across<8>(sums, whole, c, out); break;
          case 16: add_across<16>(sums, whole, c, out); break;
          default: add_across<0>(sums, whole, c, out);
        }
        if (whole < across) add_across<0>(sums + whole * c, 1, channels - whole * c, out + whole);
        continue;
      }
      for (int64_t i = 0; i < across; ++i)
        for (int64_t t = 0; t < taps; ++t) {
          float s = sums[i * c * taps + t];
          for (int64_t j = i * c + 1; j < std::min(channels, (i + 1) * c); ++j) s += sums[j * taps + t];
          out[t * across + i] = s;
        }
    }
  });
}

void expand_block_mask(const SelectRows& matrix, const BlockShape& block, const uint8_t* blocks,
                       uint8_t* mask) {
  const int64_t cols = matrix.cols, taps = block.taps, channels = cols / taps;
  const int64_t across = ceil_div(channels, block.c);
  for_rows(ceil_div(matrix.rows, block.r), cols * block.r, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      const uint8_t* const in = blocks + b * taps * across;
      uint8_t* const first = mask + b * block.r * cols;
      if (taps == 1) {
        for (int64_t i = 0; i < across; ++i)
          std::memset(first + i * block.c, in[i], std::min(block.c, channels - i * block.c));
      } else {
        for (int64_t ch = 0; ch < channels; ++ch)
          for (int64_t t = 0; t < taps; ++t) first[ch * taps + t] = in[t * across + ch / block.c];
      }
      for (int64_t r = 1; r < std::min(block.r, matrix.rows - b * block.r); ++r)
        std::memcpy(first + r * cols, first, cols);
    }
  });
}

}  // namespace pared
