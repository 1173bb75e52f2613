// Selection among keys that lie in cache: the end of every selection, and all of a row-wise one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/aligned.h"
#include "core/isa.h"
#include "kernels/registry.h"

namespace pared {

struct SelectKernels {
  explicit SelectKernels(Isa isa)
      : keys(kernel_for<select_keys>(isa).fn),
        bracket(kernel_for<select_bracket>(isa).fn),
        small(kernel_for<select_small>(isa).fn),
        mask(kernel_for<select_mask>(isa).fn) {}
  select_keys::Fn* keys;
  select_bracket::Fn* bracket;
  select_small::Fn* small;
  select_mask::Fn* mask;
};

inline SelectRun raw_run(const int32_t* keys, int64_t n) {
  return {keys, nullptr, n, DType::f32, DType::f32, SelectKey::raw};
}

// A well-mixed 32-bit number for each i (the finaliser of MurmurHash3): the jitter of strided samples, so
// that no period in the data can hide from them. The same on every run, so that results' timing is
// reproducible too.
inline uint32_t mix(uint64_t i) {
  i = (i + 0x9e3779b97f4a7c15u) * 0xff51afd7ed558ccdu;
  i = (i ^ (i >> 33)) * 0xc4ceb9fe1a85ec53u;
  return static_cast<uint32_t>((i ^ (i >> 33)) >> 16);
}

// Sample i of 2^log_m among n elements: somewhere in the i-th of as many equal stretches. i * n < 2^63.
inline int64_t sample_position(int64_t i, int log_m, int64_t n) {
  const auto jitter =
      static_cast<uint64_t>(static_cast<unsigned __int128>(mix(static_cast<uint64_t>(i))) * n >> 32);
  return static_cast<int64_t>((static_cast<uint64_t>(i) * n + jitter) >> log_m);
}

// What is known of a sample beside its size: the variance of the number of its keys above some rank, as a
// multiple of that of independent keys, and how many keys an independent draw is worth.
struct SampleSpread {
  double variance = 1.0, draw = 1.0;
};

// The ranks (from the top, 1-based) that bracket rank k of n in a sample of m, `sigmas` standard deviations
// to either side. A rank below 1 or above m means that no sampled key is a bound.
struct SampleRanks {
  int64_t hi, lo;
};
inline SampleRanks bracket_ranks(int64_t k, int64_t n, int64_t m, double sigmas, SampleSpread spread = {}) {
  const double p = static_cast<double>(k) / static_cast<double>(n), expected = p * static_cast<double>(m);
  // The constant covers the ends, where the binomial's tail is longer than the normal's, and an estimate of
  // the variance from few draws.
  const double margin = sigmas * std::sqrt(spread.variance * expected * (1.0 - p)) + sigmas * spread.draw;
  return {static_cast<int64_t>(std::floor(expected - margin)),
          static_cast<int64_t>(std::ceil(expected + margin))};
}

struct Ranked {
  int32_t key;
  int64_t above, equal;  // among the keys given
};

// Quickselect with two pivots from a sample, so that a pass leaves a few tenths of the keys, and no branch on
// a key. One object for each thread: it keeps its buffers.
class KeySelect {
 public:
  // The k-th largest, 1 <= k <= n < 2^30. Keys are in (kSelectNone, INT32_MAX).
  Ranked operator()(const SelectKernels& kernels, const int32_t* keys, int64_t n, int64_t k, int depth = 0) {
    int32_t floor = kSelectNone, ceiling = INT32_MAX;  // every key that is left lies strictly between
    int64_t above = 0;
    bool bisect = false;
    for (int turn = 0;; turn ^= 1) {
      if (n <= kSelectSmall) {
        const int32_t key = kernels.small(keys, static_cast<int32_t>(n), static_cast<int32_t>(k));
        int32_t unused[kSelectPad];
        const SelectCounts c = kernels.bracket({raw_run(keys, n), key, key, true, unused});
        return {key, above + c.above, c.at_hi};
      }
      int32_t lo, hi;
      if (bisect) {
        lo = hi = static_cast<int32_t>((static_cast<int64_t>(floor) + ceiling) >> 1);
      } else {
        pivots(kernels, keys, n, k, depth, lo, hi);
      }
      int32_t* left = buffers_[depth][turn].get<int32_t>(n + kSelectPad);
      const SelectCounts c = kernels.bracket({raw_run(keys, n), lo, hi, true, left});
      const int64_t before_inside = c.above + c.at_hi, before_lo = before_inside + c.inside;
      int64_t dropped, count;
      if (k <= c.above) {
        count = kernels.bracket({raw_run(keys, n), hi, INT32_MAX, false, left}).inside;
        dropped = 0;
        floor = hi;
      } else if (k <= before_inside) {
        return {hi, above + c.above, c.at_hi};
      } else if (k <= before_lo) {
        count = c.inside;
        dropped = before_inside;
        floor = lo;
        ceiling = hi;
      } else if (k <= before_lo + c.at_lo) {
        return {lo, above + before_lo, c.at_lo};
      } else {
        count = kernels.bracket({raw_run(keys, n), kSelectNone, lo, false, left}).inside;
        dropped = n - count;
        ceiling = lo;
      }
      // A pass that got rid of little was misled by its sample: halve the range of keys instead, which ends
      // after 32 passes whatever the data.
      bisect = count > n / 2;
      keys = left;
      n = count;
      k -= dropped;
      above += dropped;
    }
  }

 private:
  static constexpr int kLargeSample = 10;  // of all these the logarithm

  void pivots(const SelectKernels& kernels, const int32_t* keys, int64_t n, int64_t k, int depth, int32_t& lo,
              int32_t& hi) {
    const int log_m = n <= 4096 ? 6 : n <= 65536 ? 7 : kLargeSample;
    const int64_t m = int64_t{1} << log_m;
    int32_t sample[1 << kLargeSample];
    for (int64_t i = 0; i < m; ++i) sample[i] = keys[sample_position(i, log_m, n)];
    const SampleRanks ranks = bracket_ranks(k, n, m, m <= kSelectSmall ? 2.0 : 3.0);
    const auto at = [&](int64_t rank) {
      if (rank < 1) return INT32_MAX;
      if (rank > m) return kSelectNone;
      if (m <= kSelectSmall)
        return kernels.small(sample, static_cast<int32_t>(m), static_cast<int32_t>(rank));
      return (*this)(kernels, sample, m, rank, depth + 1).key;
    };
    hi = at(ranks.hi);
    lo = at(ranks.lo);
  }

  Scratch buffers_[2][2];  // a sample is selected from within a selection
};

}  // namespace pared
