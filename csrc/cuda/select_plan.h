// What a selection decides on the host: plain C++, tested without a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace pared::cuda {

// A block works on a tile of consecutive elements of one member.
inline constexpr int64_t kSelectTile = 1 << 14;
inline constexpr int kSelectThreads = 256;
inline constexpr int kSelectBlocksPerMultiprocessor = 3;  // 85 registers a thread; 48 KB in flight
// Keys of the sample: what one block holds in registers. No more elements than that are selected from
// directly.
inline constexpr int kSampleThreads = 1024, kSampleEach = 32;
inline constexpr int64_t kSelectSample = int64_t{kSampleThreads} * kSampleEach;
inline constexpr int kSelectBins = 2048, kSelectPasses = 3;
// Magnitudes of 16 bits, each with a counter in a block's shared memory; a block a multiprocessor.
inline constexpr int kSelectMagnitudes = 1 << 15, kCountThreads = 1024;
inline constexpr int64_t kCountShared = int64_t{kSelectMagnitudes} * 4 + kCountThreads * 32;
// Groups up to this length are a thread's each: all pairs of 32 keys are 500 comparisons in registers.
inline constexpr int kSelectSmallGroup = 32;
// Half-width of the bracket in standard deviations: it misses once in a million selections, which then read
// the data up to three more times.
inline constexpr double kSelectSigmas = 5.0;
// Keys that are more than this share of the sample are counted, not gathered.
inline constexpr int64_t kSelectHeavy = 128;
// Members that one launch of the kernel that writes the table takes as its parameter.
inline constexpr int64_t kTablePart = 32, kMemberBytes = 64;

struct SelectPlan {
  int64_t members, elements, tiles;
  int64_t sample;  // keys; elements where that is all
  int64_t hi_rank,
      lo_rank;       // in the sample, from the top, of the bracket's ends; outside [1, sample]: no end there
  int64_t capacity;  // gathered keys that there is room for
  uint32_t blocks;   // of a pass over the data: what is resident at once
  // Byte offsets into the workspace, multiples of 256.
  int64_t table_at, bins_at, sample_bins_at, magnitudes_at, sample_at, gathered_at, tile_counts_at, bytes;

  bool direct() const { return sample == elements; }
};

inline constexpr int64_t kSelectStateBytes = 256;

// tiles: the sum over members of ceil(n / kSelectTile).
inline SelectPlan plan_select(int64_t members, int64_t elements, int64_t tiles, int64_t k,
                              int multiprocessors) {
  SelectPlan p;
  p.members = members;
  p.elements = elements;
  p.tiles = tiles;
  p.sample = std::min(elements, kSelectSample);
  p.hi_rank = p.lo_rank = k;
  p.capacity = 0;
  if (!p.direct()) {
    const double share = static_cast<double>(k) / static_cast<double>(elements);
    const double expected = share * static_cast<double>(p.sample);
    // The constant covers the ends, where the binomial's tail is longer than the normal's.
    const double margin = kSelectSigmas * std::sqrt(expected * (1.0 - share)) + kSelectSigmas;
    p.hi_rank = static_cast<int64_t>(std::floor(expected - margin));
    p.lo_rank = static_cast<int64_t>(std::ceil(expected + margin));
    // Half as much again as is expected, the ends included as long as they are no heavy keys.
    const int64_t width = std::min(p.lo_rank, p.sample) - std::max<int64_t>(p.hi_rank, 0) + 1;
    const double inside =
        static_cast<double>(width) / static_cast<double>(p.sample) + 2.0 / static_cast<double>(kSelectHeavy);
    p.capacity = std::min(elements,
                          static_cast<int64_t>(1.5 * inside * static_cast<double>(elements)) + kSelectSample);
  }
  p.blocks = static_cast<uint32_t>(
      std::clamp<int64_t>(tiles, 1, int64_t{multiprocessors} * kSelectBlocksPerMultiprocessor));
  int64_t at = kSelectStateBytes;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at = (at + bytes + 255) / 256 * 256;
    return begin;
  };
  p.table_at = take(members * kMemberBytes);
  p.bins_at = take(int64_t{kSelectPasses} * kSelectBins * 8);
  p.sample_bins_at = take(int64_t{kSelectBins} * 4);
  p.magnitudes_at = take(p.direct() ? 0 : int64_t{kSelectMagnitudes} * 8);
  p.sample_at = take(p.sample * 4);
  p.gathered_at = take(p.capacity * 4);
  p.tile_counts_at = take(tiles * 8);
  p.bytes = at;
  return p;
}

}  // namespace pared::cuda
