// The pass over the data for 16-bit magnitudes. Two keys are a word, and are compared as they come: no key is
// made, nothing is gathered. A magnitude inside the bracket adds one to its counter in shared memory, so that
// nothing is left to do behind it. There is a counter for each magnitude: where the bracket missed, a second
// launch takes all of them for inside.
//
// What limits it is instructions: 4.3 TB/s bring 13.8 of a lane a key on 132 multiprocessors, 6.9 of them
// on the integer units.
#include "cuda/launch.h"
#include "cuda/select_device.h"

namespace pared::cuda {
namespace {

using Count = unsigned long long;

// Loads that a thread keeps in shared memory, 16 bytes each.
constexpr int kStaged = 2;

template <class T>
struct Pair;
template <>
struct Pair<__half> {
  using type = __half2;
  static constexpr uint32_t kInf = 0x7c00;
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static constexpr uint32_t kInf = 0x7f80;
};
template <class T>
using Two = typename Pair<T>::type;

// 0xffff for each half of the word whose magnitude is at least that of `threshold`; a NaN never is, and to a
// NaN nothing.
template <class T>
__device__ __forceinline__ uint32_t at_least(uint32_t word, uint32_t threshold) {
  return __hge2_mask(__habs2(bits_of<Two<T>>(word)), bits_of<Two<T>>(threshold));
}

template <class T>
__device__ __forceinline__ int32_t key_of(uint32_t magnitude) {
  return magnitude_key(widen(bits_of<T>(static_cast<uint16_t>(magnitude))));
}
// The least magnitude with a key of at least `key`, in both halves of a word; a NaN if there is none.
template <class T>
__device__ uint32_t first_from(int32_t key) {
  uint32_t low = 0, high = Pair<T>::kInf + 1;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (key_of<T>(middle) >= key) high = middle;
    else low = middle + 1;
  }
  return low * 0x10001u;
}

template <int kLoads>
__device__ __forceinline__ uint32_t word_of(const uint4 (&loaded)[kLoads], int i) {
  const uint4& four = loaded[i / 4];
  return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
}

// Magnitudes from `hi` on are above, those in [lo, hi) inside. kEnds: those from `beyond` on above, up to hi
// and in [at_lo, lo) at an end of the bracket.
struct Bounds {
  uint32_t hi, lo, beyond, at_lo;
};
struct Sums {
  uint32_t hi = 0, lo = 0, beyond = 0, at_lo = 0, nans = 0;  // from the bound on
};

// Where a block's threads count, by 32-bit address.
struct Shared {
  uint32_t bins;     // [kSelectMagnitudes]
  uint32_t* staged;  // of this thread: what it has loaded, so that a word can be found by number ^ turned
  int turned;        // 4 for every other four threads, whose two loads change places: eight touch all banks
};

// Counts the words' keys. A thread sees less than 2^32 keys of a tensor that fits into any memory there is.
template <class T, bool kEnds, int kLoads>
__device__ __forceinline__ void take(const uint4 (&loaded)[kLoads], const Bounds& bounds,
                                     const Shared& shared, Sums& sums) {
  Sums minus;           // sums of masks: minus one a lower half, minus 2^16 more an upper half
  uint32_t inside = 0;  // bit i: the lower key of word i; 16 + i: the upper one
  auto any = bits_of<Two<T>>(0u);
#pragma unroll
  for (int i = 0; i < 4 * kLoads; ++i) {
    const uint32_t word = word_of(loaded, i);
    const uint32_t hi = at_least<T>(word, bounds.hi), lo = at_least<T>(word, bounds.lo);
    minus.hi -= hi;
    inside |= lo & ~hi & 0x10001u << i;
    if constexpr (kEnds) {
      minus.lo -= lo;
      minus.beyond -= at_least<T>(word, bounds.beyond);
      minus.at_lo -= at_least<T>(word, bounds.at_lo);
    }
    any = __hmax2_nan(any, bits_of<Two<T>>(word));
  }
  if (inside) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      *reinterpret_cast<uint4*>(shared.staged + ((4 * u) ^ shared.turned)) = loaded[u];
    const uint32_t staged = ptx::shared_address(shared.staged);
    do {
      const int bit = 31 - __clz(static_cast<int>(inside));
      const uint32_t word = ptx::load_shared<uint32_t>(staged + 4 * ((bit & 15) ^ shared.turned));
      ptx::count_shared(shared.bins + (word >> (bit & 16) << 2 & (kSelectMagnitudes - 1) * 4));
      inside ^= 1u << bit;
    } while (inside);
  }
  // The lower half counts the lower keys, the upper one the upper less the lower.
  const auto add = [](uint32_t& sum, uint32_t both) {
    sum += 2 * (both & 0xffff) + static_cast<uint32_t>(static_cast<int32_t>(both) >> 16);
  };
  add(sums.hi, minus.hi);
  if constexpr (kEnds) {
    add(sums.lo, minus.lo);
    add(sums.beyond, minus.beyond);
    add(sums.at_lo, minus.at_lo);
  }
  if (__hbeq2(any, any)) return;
#pragma unroll
  for (int i = 0; i < 4 * kLoads; ++i) {
    const uint32_t word = word_of(loaded, i);
    sums.nans += ((word & 0x7fff) > Pair<T>::kInf) + ((word >> 16 & 0x7fff) > Pair<T>::kInf);
  }
}

template <class T, bool kEnds>
__device__ void count(const Workspace& ws, const Bounds& bounds, const Shared& shared) {
  constexpr int kUnroll = 4, kCount = kLoadBytes / sizeof(T);
  SelectState& s = *ws.state;
  const int thread = static_cast<int>(threadIdx.x);
  Sums sums;
  for_members(ws, [&](const Member& m, int64_t tile, int64_t end) {
    const auto p = piece_of<T, int64_t>(m, tile, end);
    const T* w = static_cast<const T*>(m.w) + p.begin;
    const uint4* loads = reinterpret_cast<const uint4*>(w + p.head) + thread;
    int64_t left = p.vectors - thread;
    for (; left > (kUnroll - 1) * kCountThreads; left -= kUnroll * kCountThreads) {
      uint4 loaded[kUnroll / kStaged][kStaged];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        loaded[u / kStaged][u % kStaged] = ptx::load_once(loads + u * kCountThreads);
      loads += kUnroll * kCountThreads;
#pragma unroll
      for (int u = 0; u < kUnroll / kStaged; ++u) take<T, kEnds>(loaded[u], bounds, shared, sums);
    }
    for (; left > 0; left -= kCountThreads, loads += kCountThreads) {
      const uint4 loaded[1] = {ptx::load_once(loads)};
      take<T, kEnds>(loaded, bounds, shared, sums);
    }
    if (thread < p.head + p.tail) {
      const int64_t i = thread < p.head ? thread : p.n - p.tail + thread - p.head;
      // Beside three halves and three words of NaNs, which are no keys.
      constexpr uint32_t kNans = 0x7fff7fffu;
      const uint4 loaded[1] = {{bits_of<uint16_t>(w[i]) | kNans << 16, kNans, kNans, kNans}};
      take<T, kEnds>(loaded, bounds, shared, sums);
      sums.nans -= 2 * 4 - 1;
    }
    static_assert(kCount == 8);
  });
  const auto add = [&](Count* to, uint32_t n) {
    const Count sum = warp_sum(Count{n});
    if (thread % 32 == 0 && sum) atomicAdd(to, sum);
  };
  add(&s.above, kEnds ? sums.beyond : sums.hi);
  add(&s.nans, sums.nans);
  if constexpr (kEnds) {
    add(&s.at_hi, sums.hi - sums.beyond);
    add(&s.at_lo, sums.at_lo - sums.lo);
  }
}

// again: after another launch, whose bracket may have missed; this one's then holds every number.
template <class T>
__global__ void __launch_bounds__(kCountThreads, 1)
    select_count_kernel(Workspace ws, Count k, SelectResult result, const bool again) {
  PARED_DYNAMIC_SHARED(dynamic);
  static_assert(kCountShared == (kSelectMagnitudes + kCountThreads * kStaged * 4) * sizeof(uint32_t));
  PARED_SHARED(Count[kCountThreads / 32], scratch);
  auto* const bins = reinterpret_cast<uint32_t*>(dynamic);
  SelectState& s = *ws.state;
  if (again && s.source == Source::none) return;
  const int32_t lo = s.lo, hi = s.hi;
  const auto after = [](int32_t key) { return key == INT32_MAX ? key : key + 1; };
  const Bounds bounds = {first_from<T>(hi), first_from<T>(after(lo)), first_from<T>(after(hi)),
                         first_from<T>(lo)};
  const auto first = static_cast<int>(bounds.lo & 0xffff), end = static_cast<int>(bounds.hi & 0xffff),
             thread = static_cast<int>(threadIdx.x);
  for (int i = first + thread; i < end; i += kCountThreads) bins[i] = 0;
  __syncthreads();
  const Shared shared = {ptx::shared_address(bins), bins + kSelectMagnitudes + thread * kStaged * 4,
                         thread & 4};
  if (s.ends) count<T, true>(ws, bounds, shared);
  else count<T, false>(ws, bounds, shared);
  __syncthreads();
  for (int i = first + thread; i < end; i += kCountThreads)
    if (bins[i]) atomicAdd(&ws.magnitudes[i], Count{bins[i]});
  if (!last_block(&s.tickets[again ? 2 : 1])) return;

  // A thread has consecutive magnitudes, the first thread the largest.
  const int each = (max(end - first, 0) + kCountThreads - 1) / kCountThreads, top = end - 1 - thread * each;
  const int bottom = max(top - each, first - 1);
  Count mine = 0, total;
  for (int i = top; i > bottom; --i) mine += __ldcg(ws.magnitudes + i);
  Count above = block_prefix<kCountThreads>(mine, scratch, total);
  if (thread == 0) {
    s.inside = total;
    // NaNs are neither inside nor at an end: without a lower end they are what is left.
    const Count numbers = s.above + s.at_hi + total;
    if (lo <= kSelectNan && k > numbers) settle(s, kSelectNan, numbers, s.nans, k, result);
    else conclude(s, k, result, [&](Count) {});
  }
  const Count before = s.above + s.at_hi;
  if (before < k && k <= before + total) {
    above += before;
    for (int i = top; i > bottom; --i) {
      const Count here = __ldcg(ws.magnitudes + i);
      if (above < k && k <= above + here)
        settle(s, key_of<T>(static_cast<uint32_t>(i)), above, here, k, result);
      above += here;
    }
    return;
  }
  __syncthreads();
  if (s.source == Source::none) return;
  // The bracket missed.
  for (int i = first + thread; i < end; i += kCountThreads) ws.magnitudes[i] = 0;
  if (thread == 0) {
    s.above = s.at_hi = s.at_lo = s.nans = 0;
    s.lo = kSelectNone;
    s.hi = INT32_MAX;
    s.ends = 0;
  }
}

}  // namespace

void launch_select_count(const Workspace& ws, DType dtype, int64_t k, const SelectResult& result, int device,
                         cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(ws.tiles, multiprocessors(device)));
  const LaunchPlan plan = {blocks, kCountThreads, kCountShared};
  const auto kernel = dtype == DType::f16 ? select_count_kernel<__half> : select_count_kernel<__nv_bfloat16>;
  for (const bool again : {false, true})
    launch("select_count", kernel, plan, stream, ws, static_cast<Count>(k), result, again);
}

}  // namespace pared::cuda
