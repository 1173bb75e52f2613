// The selection kernels' signatures. Included by kernels/types.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "core/dtype.h"

namespace pared {

// How an element becomes a key. Keys are int32 and compare as the numbers they stand for: a non-negative
// float32's key is its bits, a negative one's the negated bits of its magnitude (so -0.0 equals 0.0). 16-bit
// floats are widened first, which is exact. Products are rounded once, in float32, on every level alike.
enum class SelectKey : uint8_t {
  raw,       // the elements are int32 keys
  abs,       // |w|
  identity,  // w
  square,    // w * w
  product,   // |w * g|
};
inline constexpr int32_t kSelectInf = 0x7f800000;        // the greatest key of a number
inline constexpr int32_t kSelectNan = -0x7fffffff;       // NaN ranks below every number
inline constexpr int32_t kSelectNone = -0x7fffffff - 1;  // no element has this key, nor INT32_MAX

// A run of elements that lie side by side.
struct SelectRun {
  const void* w;
  const void* g;  // the second factor of `product`
  int64_t n;
  DType dtype;    // f32, f16 or bf16
  DType g_dtype;  // f32, or the same as dtype
  SelectKey key;
};

// out[i] = key of element i. Returns the number of NaNs.
struct select_keys {
  using Fn = int64_t(const SelectRun& run, int32_t* out);
  static constexpr const char* doc = "floats to ordered int32 keys";
};

// One pass of the selection: gathers the keys strictly between `lo` and `hi` into `out`, in order, and counts
// those above. Keys equal to `hi` or `lo` are counted apart if `ends` says so (with lo == hi all as at_hi);
// otherwise those equal to `hi` count as above and those equal to `lo` nowhere. Runs of less than 2^28 keys
// or 2^20 elements.
inline constexpr int kSelectPad = 16;  // `out` is written up to this many keys beyond the last
struct SelectBracketArgs {
  SelectRun run;
  int32_t lo, hi;
  bool ends;
  int32_t* out;
};
struct SelectCounts {
  int64_t above, at_hi, at_lo, inside, nans;
};
struct select_bracket {
  using Fn = SelectCounts(const SelectBracketArgs&);
  static constexpr const char* doc = "count keys above a bracket, gather those inside";
};

// The k-th largest of n int32 keys, 1 <= k <= n <= kSelectSmall.
inline constexpr int kSelectSmall = 128;
struct select_small {
  using Fn = int32_t(const int32_t* keys, int32_t n, int32_t k);
  static constexpr const char* doc = "k-th largest of at most 128 keys, without a branch on the data";
};

// mask[i] = key > threshold, or key == threshold for the first `ties` such elements. Returns the ties taken.
struct SelectMaskArgs {
  SelectRun run;
  int32_t threshold;
  int64_t ties;
  bool nans;  // there may be NaNs
  uint8_t* mask;
};
struct select_mask {
  using Fn = int64_t(const SelectMaskArgs&);
  static constexpr const char* doc = "mask of the keys above a threshold, ties to the lowest index";
};

// In each group of m consecutive keys the n largest, ties to the lowest index; the last group may be short.
inline constexpr int kSelectMaxGroup = 16;  // of m
struct SelectGroupArgs {
  const int32_t* keys;
  int64_t count;
  int32_t n, m;
  uint8_t* mask;
};
struct select_group {
  using Fn = void(const SelectGroupArgs&);
  static constexpr const char* doc = "mask of the n largest of every m keys";
};

// Sums of the keys (as floats) down `rows` rows: sums[c] = ((f(0,c) + f(1,c)) + ...), in float32, in this
// order.
struct SelectSumArgs {
  SelectRun run;                     // the first row, n columns
  int64_t rows, w_stride, g_stride;  // bytes between rows
  float* sums;
};
struct select_sum {
  using Fn = void(const SelectSumArgs&);
  static constexpr const char* doc = "column sums of scores over the rows of a block";
};

}  // namespace pared
