#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/select_device.h"

namespace pared::cuda {
namespace {

using Count = unsigned long long;

struct PrefixShared {
  Count sums[kSelectThreads / 32];
};

// ---- ties: up to which tile all of them are selected. Nothing to do when that is all there are.

__global__ void __launch_bounds__(kSelectThreads, kSelectBlocksPerMultiprocessor)
    select_ties_kernel(Workspace ws) {
  PARED_SHARED(PrefixShared, shared);
  SelectState& s = *ws.state;
  const int thread = static_cast<int>(threadIdx.x);
  if (s.ties == s.equal) {
    if (blockIdx.x == 0 && thread == 0) s.cut_tile = ws.tiles;
    return;
  }
  const int32_t threshold = s.key;
  for_tiles(ws, [&](const Member& m, int64_t tile) {
    uint32_t equal = 0;
    visit(
        m, tile,
        [&](const auto& keys, int64_t) {
#pragma unroll
          for (int32_t key : keys) equal += key == threshold;
        },
        [] {});
    Count total;
    block_prefix<kSelectThreads>(Count{equal}, shared.sums, total);
    if (thread == 0) ws.tile_counts[tile] = total;
  });
  if (!last_block(&s.tickets[2 + kSelectPasses])) return;
  constexpr int kEach = 8;
  Count before = 0;
  for (int64_t first = 0; first < ws.tiles; first += kSelectThreads * kEach) {
    Count counts[kEach], mine = 0, total;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t tile = first + int64_t{thread} * kEach + j;
      mine += counts[j] = tile < ws.tiles ? ws.tile_counts[tile] : 0;
    }
    Count at = before + block_prefix<kSelectThreads>(mine, shared.sums, total);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (at < s.ties && s.ties <= at + counts[j]) {
        s.cut_tile = first + int64_t{thread} * kEach + j;
        s.cut = s.ties - at;
      }
      at += counts[j];
    }
    before += total;
  }
}

// ---- the mask

// kCount bytes of 0 or 1, stored at once where the mask is aligned to them.
template <int kCount>
__device__ __forceinline__ void store_mask(uint8_t* mask, const bool (&selected)[kCount]) {
  if constexpr (kCount == 1) {
    *mask = selected[0];
  } else {
    uint32_t words[kCount / 4] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) words[j / 4] |= uint32_t{selected[j]} << (8 * (j % 4));
    if (reinterpret_cast<uintptr_t>(mask) % kCount == 0) {
      if constexpr (kCount == 4) *reinterpret_cast<uint32_t*>(mask) = words[0];
      else *reinterpret_cast<uint2*>(mask) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) mask[j] = selected[j];
    }
  }
}

__global__ void __launch_bounds__(kSelectThreads, kSelectBlocksPerMultiprocessor)
    select_mask_kernel(Workspace ws) {
  PARED_SHARED(PrefixShared, shared);
  const SelectState& s = *ws.state;
  const int32_t threshold = s.key;
  const int64_t cut_tile = s.cut_tile;
  for_tiles(ws, [&](const Member& m, int64_t tile) {
    if (tile != cut_tile) {
      const int32_t above = tile < cut_tile ? threshold - 1 : threshold;  // no key is INT32_MIN
      visit(
          m, tile,
          [&](const auto& keys, int64_t i) {
            constexpr int kKeys = sizeof(keys) / sizeof(keys[0]);
            bool selected[kKeys];
#pragma unroll
            for (int j = 0; j < kKeys; ++j) selected[j] = keys[j] > above;
            store_mask<kKeys>(m.mask + i, selected);
          },
          [] {});
      return;
    }
    // The one tile of which some ties are selected and some are not: in order.
    const int64_t begin = (tile - m.first_tile) * kSelectTile, end = min(m.n, begin + kSelectTile);
    Count left = s.cut;
    for (int64_t first = begin; first < end; first += kSelectThreads) {
      const int64_t i = first + threadIdx.x;
      const int32_t key = i < end ? key_at(m, i) : kSelectNone;
      Count ties;
      const Count before = block_prefix<kSelectThreads>(Count{key == threshold}, shared.sums, ties);
      if (i < end) m.mask[i] = key > threshold || (key == threshold && before < left);
      left -= min(left, ties);
    }
  });
}

// ---- indices of the mask

constexpr int kCompactEach = 4;

// Of the elements [i, i + kCompactEach) of the tile's member those that are selected, as bits.
__device__ uint32_t selected_bits(const Member& m, int64_t i, int64_t end) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kCompactEach; ++j)
    if (i + j < end && m.mask[i + j]) bits |= 1u << j;
  return bits;
}

// Calls f(thread's first element, its bits, selected before them in the tile) for the tile, in order.
template <class F>
__device__ void for_selected(const Member& m, int64_t tile, PrefixShared& shared, F f) {
  const int64_t begin = (tile - m.first_tile) * kSelectTile, end = min(m.n, begin + kSelectTile);
  Count before = 0;
  for (int64_t first = begin; first < end; first += int64_t{kSelectThreads} * kCompactEach) {
    const int64_t i = first + int64_t{threadIdx.x} * kCompactEach;
    const uint32_t bits = selected_bits(m, i, end);
    Count total;
    const Count at = block_prefix<kSelectThreads>(static_cast<Count>(__popc(bits)), shared.sums, total);
    f(i, bits, before + at);
    before += total;
  }
}

__global__ void __launch_bounds__(kSelectThreads) select_count_mask_kernel(Workspace ws) {
  PARED_SHARED(PrefixShared, shared);
  SelectState& s = *ws.state;
  const int thread = static_cast<int>(threadIdx.x);
  for_tiles(ws, [&](const Member& m, int64_t tile) {
    const int64_t begin = (tile - m.first_tile) * kSelectTile, end = min(m.n, begin + kSelectTile);
    Count mine = 0, total;
    for (int64_t i = begin + thread; i < end; i += kSelectThreads) mine += m.mask[i];
    block_prefix<kSelectThreads>(mine, shared.sums, total);
    if (thread == 0) ws.tile_counts[tile] = total;
  });
  if (!last_block(&s.tickets[3 + kSelectPasses])) return;
  // Counts become places.
  Count before = 0;
  for (int64_t first = 0; first < ws.tiles; first += kSelectThreads) {
    const int64_t tile = first + thread;
    Count total;
    const Count count = tile < ws.tiles ? ws.tile_counts[tile] : 0;
    const Count at = before + block_prefix<kSelectThreads>(count, shared.sums, total);
    if (tile < ws.tiles) ws.tile_counts[tile] = at;
    before += total;
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    select_compact_kernel(Workspace ws, int32_t* keys, int64_t* indices) {
  PARED_SHARED(PrefixShared, shared);
  for_tiles(ws, [&](const Member& m, int64_t tile) {
    const Count place = ws.tile_counts[tile];
    for_selected(m, tile, shared, [&](int64_t i, uint32_t bits, Count before) {
      Count at = place + before;
      for (; bits; bits &= bits - 1) {
        const int64_t element = i + __ffs(static_cast<int>(bits)) - 1;
        keys[at] = key_at(m, element);
        indices[at++] = element;
      }
    });
  });
}

}  // namespace

void select_mask(const SelectPlan& plan, void* memory, int device, cudaStream_t stream) {
  const DeviceGuard guard(device, "select_mask");
  const Workspace ws = workspace(plan, memory);
  const LaunchPlan pass = {plan.blocks, kSelectThreads};
  launch("select_ties", select_ties_kernel, pass, stream, ws);
  launch("select_mask", select_mask_kernel, pass, stream, ws);
}

void select_compact(const SelectPlan& plan, void* memory, int32_t* keys, int64_t* indices, int device,
                    cudaStream_t stream) {
  const DeviceGuard guard(device, "select_compact");
  const Workspace ws = workspace(plan, memory);
  const LaunchPlan pass = {plan.blocks, kSelectThreads};
  launch("select_count_mask", select_count_mask_kernel, pass, stream, ws);
  launch("select_compact", select_compact_kernel, pass, stream, ws, keys, indices);
}

}  // namespace pared::cuda
