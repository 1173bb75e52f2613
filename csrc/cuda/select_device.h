// What the kernels of a selection share on the device: keys, tiles, the state between launches, and a block's
// own steps.
#pragma once

#include "cuda/ptx.h"
#include "cuda/select.h"

namespace pared::cuda {

// ---- keys

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ int32_t magnitude_key(float v) {
  const int32_t bits = __float_as_int(v) & 0x7fffffff;
  return bits > kSelectInf ? kSelectNan : bits;
}
__device__ __forceinline__ int32_t signed_key(float v) {
  const int32_t bits = __float_as_int(v), magnitude = bits & 0x7fffffff;
  return magnitude > kSelectInf ? kSelectNan : bits < 0 ? -magnitude : magnitude;
}
// `kind` is the same for all threads. Products are rounded once, whatever the compiler would like to fuse.
__device__ __forceinline__ int32_t make_key(SelectKey kind, float w, float g) {
  switch (kind) {
    case SelectKey::identity: return signed_key(w);
    case SelectKey::square: return magnitude_key(__fmul_rn(w, w));
    case SelectKey::product: return magnitude_key(__fmul_rn(w, g));
    default: return magnitude_key(w);
  }
}
__device__ __forceinline__ float key_value(int32_t key) {
  if (key == kSelectNan) return __int_as_float(0x7fc00000);
  if (key > kSelectInf) return __int_as_float(kSelectInf);
  return key >= 0 ? __int_as_float(key) : -__int_as_float(-key);
}
// The same order, unsigned.
__device__ __forceinline__ uint32_t ordered(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }
__device__ __forceinline__ int32_t from_ordered(uint32_t u) { return static_cast<int32_t>(u ^ 0x80000000u); }

// ---- the workspace

// A SelectMember with the places of its elements and tiles in the selection.
struct Member {
  const void* w;
  const void* g;
  uint8_t* mask;
  int64_t n, period, first, first_tile;
  DType dtype, g_dtype;
  SelectKey key;
};
static_assert(sizeof(Member) == kMemberBytes);

enum class Source : uint32_t { none, gathered, data };  // what the passes of 11 bits read; none: settled

struct SelectState {
  unsigned long long above, at_hi, at_lo, inside, nans;  // of the pass over the data
  unsigned long long before;                             // keys above the range [base, last]
  unsigned long long rank;         // of the k-th key among those in the range, from the top
  unsigned long long equal, ties;  // of the result
  long long cut_tile;      // tiles before it select all keys equal to the threshold, tiles behind it none,
  unsigned long long cut;  // itself the first `cut`
  int32_t lo, hi, key;
  uint32_t ends;  // whether keys equal to lo and hi are counted apart
  Source source;
  uint32_t base, last;                  // ordered keys
  uint32_t tickets[kSelectPasses + 4];  // blocks that are done, by launch
};
static_assert(sizeof(SelectState) <= kSelectStateBytes);

struct Workspace {
  SelectState* state;
  Member* table;
  unsigned long long* bins;        // [kSelectPasses][kSelectBins]
  uint32_t* sample_bins;           // [kSelectBins], of the sample's keys by their highest digit
  unsigned long long* magnitudes;  // [kSelectMagnitudes], of those inside the bracket
  int32_t* sample;
  int32_t* gathered;
  unsigned long long* tile_counts;
  int64_t members, elements, tiles, capacity;
};
inline Workspace workspace(const SelectPlan& p, void* memory) {
  char* const m = static_cast<char*>(memory);
  return {reinterpret_cast<SelectState*>(m),
          reinterpret_cast<Member*>(m + p.table_at),
          reinterpret_cast<unsigned long long*>(m + p.bins_at),
          reinterpret_cast<uint32_t*>(m + p.sample_bins_at),
          reinterpret_cast<unsigned long long*>(m + p.magnitudes_at),
          reinterpret_cast<int32_t*>(m + p.sample_at),
          reinterpret_cast<int32_t*>(m + p.gathered_at),
          reinterpret_cast<unsigned long long*>(m + p.tile_counts_at),
          p.members,
          p.elements,
          p.tiles,
          p.capacity};
}

// The member with the last `first` (or `first_tile`) at or below `x`; empty members share theirs with the
// next.
template <int64_t Member::* kField>
__device__ __forceinline__ int64_t find_member(const Member* table, int64_t members, int64_t x) {
  int64_t low = 0, high = members;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (table[middle].*kField <= x) low = middle;
    else high = middle;
  }
  return low;
}

__device__ __forceinline__ float factor(const Member& m, int64_t i) {
  if (m.key != SelectKey::product) return 0.0f;
  if (m.period) i %= m.period;
  switch (m.g_dtype) {
    case DType::f32: return static_cast<const float*>(m.g)[i];
    case DType::f16: return widen(static_cast<const __half*>(m.g)[i]);
    default: return widen(static_cast<const __nv_bfloat16*>(m.g)[i]);
  }
}
__device__ __forceinline__ int32_t key_at(const Member& m, int64_t i) {
  float w;
  switch (m.dtype) {
    case DType::f32: w = static_cast<const float*>(m.w)[i]; break;
    case DType::f16: w = widen(static_cast<const __half*>(m.w)[i]); break;
    default: w = widen(static_cast<const __nv_bfloat16*>(m.w)[i]); break;
  }
  return make_key(m.key, w, factor(m, i));
}

// ---- tiles

inline constexpr int kLoadBytes = 16;

// The elements [begin, begin + n) of a member: `head` up to the first 16-byte boundary of w, `vectors` loads,
// `tail`. Size: what n fits in.
template <class Size>
struct Piece {
  int64_t begin;
  Size n, vectors;
  int head, tail;
};
using Tile = Piece<int>;
// The tiles [tile, end) of a member.
template <class T, class Size>
__device__ __forceinline__ Piece<Size> piece_of(const Member& m, int64_t tile, int64_t end) {
  constexpr int kCount = kLoadBytes / sizeof(T);
  Piece<Size> p;
  p.begin = (tile - m.first_tile) * kSelectTile;
  p.n = static_cast<Size>(min((end - tile) * kSelectTile, m.n - p.begin));
  const auto misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(m.w) % kLoadBytes);
  p.head = static_cast<int>(
      min(p.n, static_cast<Size>(misaligned ? (kLoadBytes - misaligned) / static_cast<int>(sizeof(T)) : 0)));
  p.vectors = (p.n - p.head) / kCount;
  p.tail = static_cast<int>(p.n - p.head - p.vectors * kCount);
  return p;
}
template <class T>
__device__ __forceinline__ Tile tile_of(const Member& m, int64_t tile) {
  return piece_of<T, int>(m, tile, tile + 1);
}

// The keys of one load, whose first element is `i` of the member.
template <class T>
__device__ __forceinline__ void load_keys(const Member& m, int64_t i, const uint4& loaded,
                                          int32_t (&keys)[kLoadBytes / sizeof(T)]) {
  constexpr int kCount = kLoadBytes / sizeof(T);
  const T* w = reinterpret_cast<const T*>(&loaded);
  if (m.key != SelectKey::product) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) keys[j] = make_key(m.key, widen(w[j]), 0.0f);
  } else if (m.period) {
    auto column = static_cast<int64_t>(i % m.period);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      keys[j] = make_key(SelectKey::product, widen(w[j]), __ldg(static_cast<const float*>(m.g) + column));
      if (++column == m.period) column = 0;
    }
  } else {
    const T* g = static_cast<const T*>(m.g) + i;
    if (reinterpret_cast<uintptr_t>(g) % kLoadBytes == 0) {
      const uint4 factors = ptx::load_once(reinterpret_cast<const uint4*>(g));
      const T* f = reinterpret_cast<const T*>(&factors);
#pragma unroll
      for (int j = 0; j < kCount; ++j) keys[j] = make_key(SelectKey::product, widen(w[j]), widen(f[j]));
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) keys[j] = make_key(SelectKey::product, widen(w[j]), widen(g[j]));
    }
  }
}

// Calls take(keys, i) for every load of a tile and take(one key, i) for the elements at its ends, in no
// order; after each of these, step() of whole warps. All threads of the block call this.
template <class T, class Take, class Step>
__device__ __forceinline__ void visit_tile(const Member& m, int64_t tile, Take take, Step step) {
  constexpr int kCount = kLoadBytes / sizeof(T), kUnroll = 4;
  const Tile t = tile_of<T>(m, tile);
  const int thread = static_cast<int>(threadIdx.x);
  const uint4* loads = reinterpret_cast<const uint4*>(static_cast<const T*>(m.w) + t.begin + t.head);
  for (int first = 0; first < t.vectors; first += kUnroll * kSelectThreads) {
    // All loads before the first use: one warp alone cannot hide the latency of memory.
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = first + u * kSelectThreads + thread;
      if (v < t.vectors) loaded[u] = ptx::load_once(loads + v);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = first + u * kSelectThreads + thread;
      if (v < t.vectors) {
        const int64_t i = t.begin + t.head + int64_t{v} * kCount;
        int32_t keys[kCount];
        load_keys<T>(m, i, loaded[u], keys);
        take(keys, i);
      }
      step();
    }
  }
  if (thread < t.head + t.tail) {
    const int64_t i = t.begin + (thread < t.head ? thread : t.n - t.tail + thread - t.head);
    const int32_t one[1] = {key_at(m, i)};
    take(one, i);
  }
  step();
}

// The same for the member's own type.
template <class Take, class Step>
__device__ __forceinline__ void visit(const Member& m, int64_t tile, Take take, Step step) {
  switch (m.dtype) {
    case DType::f32: return visit_tile<float>(m, tile, take, step);
    case DType::f16: return visit_tile<__half>(m, tile, take, step);
    default: return visit_tile<__nv_bfloat16>(m, tile, take, step);
  }
}

// Calls f(member, tile, end) for this block's share of all tiles: consecutive ones, [tile, end) of a member.
template <class F>
__device__ __forceinline__ void for_members(const Workspace& ws, F f) {
  int64_t tile = ws.tiles * blockIdx.x / gridDim.x;
  const int64_t last = ws.tiles * (blockIdx.x + 1) / gridDim.x;
  if (tile == last) return;
  int64_t at = find_member<&Member::first_tile>(ws.table, ws.members, tile);
  while (true) {
    const int64_t next = at + 1 < ws.members ? ws.table[at + 1].first_tile : ws.tiles;
    const int64_t end = min(last, next);
    if (tile < end) f(ws.table[at], tile, end);  // no elements, no tiles
    if (next >= last) return;
    tile = max(tile, next);
    ++at;
  }
}
// Calls f(member, tile) for each of them.
template <class F>
__device__ __forceinline__ void for_tiles(const Workspace& ws, F f) {
  for_members(ws, [&](const Member& member, int64_t tile, int64_t end) {
    const Member m = member;
    for (; tile < end; ++tile) f(m, tile);
  });
}

// ---- a block's own steps

// Whether this block is the last of the grid to come here. What the others wrote before is then visible:
// thread 0's fences are between its barriers with the other threads and the counter.
__device__ __forceinline__ bool last_block(uint32_t* ticket) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last) __threadfence();
  }
  return __syncthreads_or(last);
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}

// Exclusive prefix sum over the threads of a block of kThreads. Scratch: kThreads / 32 values. With barriers
// at both ends.
template <int kThreads, class T>
__device__ __forceinline__ T block_prefix(T v, T* scratch, T& total) {
  const int lane = ptx::lane(), warp = static_cast<int>(threadIdx.x) / 32;
  T inclusive = v;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T below = __shfl_up_sync(0xffffffffu, inclusive, d);
    if (lane >= d) inclusive += below;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) before = total;
    total += scratch[w];
  }
  return before + inclusive - v;
}

// Of counts by bin, aligned to 16 bytes, the one with the rank-th key, from the top bin down, 1-based.
template <class C>
struct Picked {
  uint32_t bin;
  C above, count;  // keys in higher bins, and in this one
};
template <int kThreads, class C>
struct PickScratch {
  C sums[kThreads / 32];
  Picked<C> picked;
};
template <int kThreads, class C>
__device__ __forceinline__ Picked<C> pick_bin(const C* bins, C rank, PickScratch<kThreads, C>& scratch) {
  constexpr int kEach = kSelectBins / kThreads;
  const int top = kSelectBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  C mine[kEach], sum = 0, total;
  // Several with one load: one at a time, up to eight lanes would be after the same bank.
  constexpr int kMost = 16 / sizeof(C), kLoad = kEach < kMost ? kEach : kMost;
  struct alignas(kLoad * sizeof(C)) Several {
    C at[kLoad];
  };
#pragma unroll
  for (int j = 0; j < kEach; j += kLoad) {
    const auto several = *reinterpret_cast<const Several*>(bins + top - j - (kLoad - 1));
#pragma unroll
    for (int i = 0; i < kLoad; ++i) sum += mine[j + i] = several.at[kLoad - 1 - i];
  }
  C above = block_prefix<kThreads>(sum, scratch.sums, total);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (above < rank && rank <= above + mine[j])
      scratch.picked = {static_cast<uint32_t>(top - j), above, mine[j]};
    above += mine[j];
  }
  __syncthreads();
  const Picked<C> picked = scratch.picked;
  __syncthreads();  // before somebody picks again
  return picked;
}

// The bits below the digit that a pass over the ordered keys [base, last] looks at.
__device__ __forceinline__ int digit_shift(uint32_t base, uint32_t last) {
  constexpr int kDigitBits = 11;
  static_assert(1 << kDigitBits == kSelectBins);
  return max(0, 32 - __clz(static_cast<int>(last - base)) - kDigitBits);
}

// An addition of one whose result nobody wants becomes ATOMS.POPC.INC: lanes of the same bin do not wait for
// each other, so that a tensor of mostly one value is no slower.
__device__ __forceinline__ void count_bin(uint32_t* bins, uint32_t bin) { atomicAdd(&bins[bin], 1u); }

// ---- what a pass over the data has found

// By one thread: the threshold is known, `above` keys are greater and `equal` the same.
__device__ inline void settle(SelectState& s, int32_t key, unsigned long long above, unsigned long long equal,
                              unsigned long long k, const SelectResult& result) {
  s.key = key;
  s.equal = equal;
  s.ties = k - above;
  s.source = Source::none;
  *result.value = key_value(key);
  result.counts[0] = static_cast<int64_t>(above);
  result.counts[1] = static_cast<int64_t>(s.ties);
  result.counts[2] = static_cast<int64_t>(equal);
  result.counts[3] = static_cast<int64_t>(s.nans);
}

// By one thread: the passes of 11 bits find the k-th key among the ordered keys [base, last].
__device__ inline void search(SelectState& s, unsigned long long k, Source source, uint32_t base,
                              uint32_t last, unsigned long long before) {
  s.source = source;
  s.base = base;
  s.last = last;
  s.before = before;
  s.rank = k - before;
}

// By one thread, when all have been counted: settles, or says where the passes of 11 bits search. inside(n):
// what is to be done when the k-th key is inside the bracket, above which there are n.
template <class Inside>
__device__ __forceinline__ void conclude(SelectState& s, unsigned long long k, const SelectResult& result,
                                         Inside inside) {
  // With hi == lo all equal keys were counted twice.
  const unsigned long long at_lo = s.lo == s.hi ? 0 : s.at_lo;
  const unsigned long long before_inside = s.above + s.at_hi, before_lo = before_inside + s.inside;
  const uint32_t hi = ordered(s.hi), lo = ordered(s.lo);
  if (k <= s.above) return search(s, k, Source::data, s.ends ? hi + 1 : hi, 0xffffffffu, 0);
  if (k <= before_inside) return settle(s, s.hi, s.above, s.at_hi, k, result);
  if (k <= before_lo) return inside(before_inside);
  if (k <= before_lo + at_lo) return settle(s, s.lo, before_lo, at_lo, k, result);
  // Without `ends`, keys equal to hi were counted above and those equal to lo not at all.
  if (s.ends) return search(s, k, Source::data, 0, lo - 1, before_lo + at_lo);
  search(s, k, Source::data, 0, lo, before_lo);
}

// The pass over the data for tensors of 16 bits, all of one type, whose keys are magnitudes, by
// kCountThreads: what is inside the bracket is counted by magnitude and not gathered. Another one where the
// bracket missed.
void launch_select_count(const Workspace& ws, DType dtype, int64_t k, const SelectResult& result, int device,
                         cudaStream_t stream);

// Narrows [base, last] to what has the picked digit.
__device__ __forceinline__ void narrow(uint32_t& base, uint32_t& last, uint32_t bin, int shift) {
  base += bin << shift;
  last = min(last, base + ((1u << shift) - 1));
}

}  // namespace pared::cuda
