#include <algorithm>

#include "core/check.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/select_device.h"

namespace pared::cuda {
namespace {

using Count = unsigned long long;

// ---- the first launches: the table of members, a part a launch because parameters are what a graph keeps

struct TablePart {
  Member members[kTablePart];
};

__global__ void __launch_bounds__(kSelectThreads)
    select_begin_kernel(Workspace ws, const TablePart part, int64_t first, int count) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) ws.table[first + thread] = part.members[thread];
  if (first != 0) return;
  for (int i = thread; i < kSelectBins; i += kSelectThreads) ws.sample_bins[i] = 0;
  if (thread == 0) *ws.state = SelectState{};
}

// ---- the sample

__device__ uint32_t mix(uint64_t i) {  // as ops/topk_keys.h
  i = (i + 0x9e3779b97f4a7c15u) * 0xff51afd7ed558ccdu;
  i = (i ^ (i >> 33)) * 0xc4ceb9fe1a85ec53u;
  return static_cast<uint32_t>((i ^ (i >> 33)) >> 16);
}
// Somewhere in the i-th of kSelectSample equal stretches of n elements.
__device__ int64_t sample_position(int64_t i, int64_t n) {
  const uint64_t jitter = mix(static_cast<uint64_t>(i)), un = static_cast<uint64_t>(n);
  const uint64_t offset = jitter * (un >> 32) + (jitter * (un & 0xffffffffu) >> 32);  // jitter * n / 2^32
  return static_cast<int64_t>((static_cast<uint64_t>(i) * un + offset) / kSelectSample);
}

struct SampleShared {
  alignas(16) uint32_t bins[kSelectBins];
  PickScratch<kSampleThreads, uint32_t> pick;
};
struct Ranked {
  int32_t key;
  uint32_t above, equal;
};

// The key of this rank is among the ordered keys [base, last], `above` are greater than those.
struct Search {
  uint32_t rank, base = 0, last = 0xffffffffu, above = 0;
};
// Goes on to the digit of which s.bins has the counts; returns how many keys have it.
__device__ uint32_t next_digit(Search& at, int shift, SampleShared& s) {
  const Picked<uint32_t> p = pick_bin<kSampleThreads>(s.bins, at.rank, s.pick);
  at.rank -= p.above;
  at.above += p.above;
  narrow(at.base, at.last, p.bin, shift);
  return p.count;
}
// By the highest digit, which has been counted.
constexpr int kHighestShift = 21;
static_assert(1 << (32 - kHighestShift) == kSelectBins);
__device__ Search begin_search(int64_t rank, SampleShared& s) {
  Search at{static_cast<uint32_t>(rank)};
  next_digit(at, kHighestShift, s);
  return at;
}
// By the others, of the keys that the block's threads hold. even: of each, so many low bits are zero, but for
// NaN.
__device__ Ranked end_search(Search at, const int32_t (&keys)[kSampleEach], int even, SampleShared& s) {
  while (true) {
    const int shift = digit_shift(at.base, at.last);
    for (int i = static_cast<int>(threadIdx.x); i < kSelectBins; i += kSampleThreads) s.bins[i] = 0;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kSampleEach; ++j) {
      const uint32_t u = ordered(keys[j]) - at.base;
      if (u <= at.last - at.base) count_bin(s.bins, u >> shift);
    }
    __syncthreads();
    const uint32_t equal = next_digit(at, shift, s);
    if (shift <= even) return {max(from_ordered(at.base), kSelectNan), at.above, equal};
  }
}

__global__ void __launch_bounds__(kSampleThreads, 1)
    select_sample_kernel(Workspace ws, int64_t count, int64_t hi_rank, int64_t lo_rank, int even,
                         SelectResult result) {
  PARED_SHARED(SampleShared, shared);
  const int thread = static_cast<int>(threadIdx.x);
  const bool direct = count == ws.elements;
  const int64_t i = int64_t{blockIdx.x} * kSampleThreads + thread;
  // Each block counts its keys by their highest digit. One block alone would count all of them twice, for
  // both ranks, most in the few bins of the same exponents.
  for (int b = thread; b < kSelectBins; b += kSampleThreads) shared.bins[b] = 0;
  __syncthreads();
  if (i < count) {
    const int64_t at = direct ? i : sample_position(i, ws.elements);
    const Member m = ws.table[find_member<&Member::first>(ws.table, ws.members, at)];
    const int32_t key = key_at(m, at - m.first);
    ws.sample[i] = key;
    count_bin(shared.bins, ordered(key) >> kHighestShift);
    static_assert(kSelectMagnitudes == kSelectSample && kSelectPasses * kSelectBins <= kSelectSample);
    if (!direct) {  // what the next launches count in
      ws.magnitudes[i] = 0;
      if (i < kSelectPasses * kSelectBins) ws.bins[i] = 0;
    }
  }
  __syncthreads();
  for (int b = thread; b < kSelectBins; b += kSampleThreads)
    if (shared.bins[b]) atomicAdd(ws.sample_bins + b, shared.bins[b]);
  SelectState& s = *ws.state;
  if (!last_block(&s.tickets[0])) return;

  for (int b = thread; b < kSelectBins; b += kSampleThreads) shared.bins[b] = __ldcg(ws.sample_bins + b);
  __syncthreads();
  int32_t keys[kSampleEach];
#pragma unroll
  for (int j = 0; j < kSampleEach; ++j) {
    const int64_t from = int64_t{j} * kSampleThreads + thread;
    keys[j] = from < count ? __ldcg(ws.sample + from) : kSelectNone;
  }
  if (direct) {
    uint32_t nans = 0;
#pragma unroll
    for (int j = 0; j < kSampleEach; ++j) nans += keys[j] == kSelectNan;
    nans = warp_sum(nans);
    if (thread % 32 == 0 && nans) atomicAdd(&s.nans, nans);
    // Barriers after the NaNs. The key that no element has differs from NaN's in the last bit.
    const Ranked r = end_search(begin_search(hi_rank, shared), keys, 0, shared);
    if (thread == 0) settle(s, r.key, r.above, r.equal, static_cast<Count>(hi_rank), result);
    return;
  }
  Ranked hi = {INT32_MAX, 0, 0}, lo = {kSelectNone, 0, 0};
  Search hi_at{}, lo_at{};
  if (hi_rank >= 1) hi_at = begin_search(hi_rank, shared);
  if (lo_rank <= count) lo_at = begin_search(lo_rank, shared);
  if (hi_rank >= 1) hi = end_search(hi_at, keys, even, shared);
  if (lo_rank <= count) lo = end_search(lo_at, keys, even, shared);
  if (thread != 0) return;
  s.ends = max(hi.equal, lo.equal) > count / kSelectHeavy;
  // Ends that are few are gathered with the rest.
  s.hi = s.ends || hi.key == INT32_MAX ? hi.key : hi.key + 1;
  s.lo = s.ends || lo.key == kSelectNone ? lo.key : lo.key - 1;
}

// ---- the pass over the data

// A warp's keys from inside the bracket, on their way to the workspace: room for what is left below a flush
// and one step.
constexpr int kWarps = kSelectThreads / 32, kStepKeys = 32 * kLoadBytes / 2, kStage = 2 * kStepKeys;

struct GatherShared {
  int32_t keys[kWarps][kStage];
  uint32_t counts[kWarps];
};

template <bool kEnds>
__device__ void gather(const Workspace& ws, GatherShared& shared) {
  SelectState& s = *ws.state;
  const int32_t lo = s.lo, hi = s.hi;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int32_t* const stage = shared.keys[warp];
  uint32_t* const count = &shared.counts[warp];
  if (lane == 0) *count = 0;
  __syncwarp();
  // A thread sees less than 2^32 keys of a tensor that fits into any memory there is.
  uint32_t above = 0, at_hi = 0, at_lo = 0, nans = 0;
  uint32_t filled = 0;  // of the stage, as this lane's last addition has left it
  const auto flush = [&] {
    __syncwarp();
    const uint32_t n = *count;
    Count at = 0;
    if (lane == 0) at = atomicAdd(&s.inside, Count{n});
    at = __shfl_sync(0xffffffffu, at, 0);
    for (uint32_t i = lane; i < n; i += 32)
      if (at + i < static_cast<Count>(ws.capacity)) ws.gathered[at + i] = stage[i];
    __syncwarp();
    if (lane == 0) *count = 0;
    filled = 0;
    __syncwarp();
  };
  for_tiles(ws, [&](const Member& m, int64_t tile) {
    visit(
        m, tile,
        [&](const auto& keys, int64_t) {
          constexpr int kKeys = sizeof(keys) / sizeof(keys[0]);
          uint32_t inside = 0;
#pragma unroll
          for (int j = 0; j < kKeys; ++j) {
            above += kEnds ? keys[j] > hi : keys[j] >= hi;
            nans += keys[j] == kSelectNan;
            if constexpr (kEnds) {
              at_hi += keys[j] == hi;
              at_lo += keys[j] == lo;
            }
            inside |= static_cast<uint32_t>(keys[j] > lo && keys[j] < hi) << j;
          }
          if (!inside) return;
          const auto mine = static_cast<uint32_t>(__popc(inside));
          uint32_t at = atomicAdd(count, mine);
          filled = at + mine;
#pragma unroll
          for (int j = 0; j < kKeys; ++j)
            if (inside >> j & 1) stage[at++] = keys[j];
        },
        [&] {
          // The lane that added last knows of all of it.
          if (__any_sync(0xffffffffu, filled > kStage - kStepKeys)) flush();
        });
  });
  flush();
  const auto add = [&](Count* to, uint32_t n) {
    const Count sum = warp_sum(Count{n});
    if (lane == 0 && sum) atomicAdd(to, sum);
  };
  add(&s.above, above);
  add(&s.nans, nans);
  if constexpr (kEnds) {
    add(&s.at_hi, at_hi);
    add(&s.at_lo, at_lo);
  }
}

__global__ void __launch_bounds__(kSelectThreads, kSelectBlocksPerMultiprocessor)
    select_gather_kernel(Workspace ws, Count k, SelectResult result) {
  PARED_SHARED(GatherShared, shared);
  SelectState& s = *ws.state;
  if (s.ends) gather<true>(ws, shared);
  else gather<false>(ws, shared);
  if (!last_block(&s.tickets[1]) || threadIdx.x != 0) return;
  conclude(s, k, result, [&](Count before) {
    const bool fits = s.inside <= static_cast<Count>(ws.capacity);
    search(s, k, fits ? Source::gathered : Source::data, ordered(s.lo) + 1, ordered(s.hi) - 1, before);
  });
}

// ---- 11 bits of the ordered keys in [base, last]

struct RadixShared {
  alignas(16) uint32_t bins[kSelectBins];
  PickScratch<kSelectThreads, Count> pick;
};

__global__ void __launch_bounds__(kSelectThreads, kSelectBlocksPerMultiprocessor)
    select_radix_kernel(Workspace ws, int pass, Count k, SelectResult result) {
  PARED_SHARED(RadixShared, shared);
  SelectState& s = *ws.state;
  const Source source = s.source;
  if (source == Source::none) return;
  const uint32_t base = s.base, last = s.last;
  const int shift = digit_shift(base, last), thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kSelectBins; i += kSelectThreads) shared.bins[i] = 0;
  __syncthreads();
  const auto take = [&](int32_t key) {
    const uint32_t u = ordered(key) - base;
    if (u <= last - base) count_bin(shared.bins, u >> shift);
  };
  if (source == Source::gathered) {
    const auto count = static_cast<int64_t>(s.inside);
    const int64_t step = int64_t{gridDim.x} * kSelectThreads;
    for (int64_t i = int64_t{blockIdx.x} * kSelectThreads + thread; i < count; i += step)
      take(ws.gathered[i]);
  } else {
    for_tiles(ws, [&](const Member& m, int64_t tile) {
      visit(
          m, tile,
          [&](const auto& keys, int64_t) {
#pragma unroll
            for (int32_t key : keys) take(key);
          },
          [] {});
    });
  }
  __syncthreads();
  Count* const bins = ws.bins + int64_t{pass} * kSelectBins;
  for (int i = thread; i < kSelectBins; i += kSelectThreads)
    if (shared.bins[i]) atomicAdd(&bins[i], Count{shared.bins[i]});
  if (!last_block(&s.tickets[2 + pass])) return;
  const Count rank = s.rank;
  const Picked<Count> p = pick_bin<kSelectThreads>(bins, rank, shared.pick);
  if (thread != 0) return;
  uint32_t new_base = base, new_last = last;
  narrow(new_base, new_last, p.bin, shift);
  s.before += p.above;
  s.rank = rank - p.above;
  s.base = new_base;
  s.last = new_last;
  if (shift == 0) settle(s, from_ordered(new_base), s.before, p.count, k, result);
}

}  // namespace

void select_threshold(const std::vector<SelectMember>& members, const SelectPlan& plan, int64_t k,
                      void* workspace_memory, const SelectResult& result, int device, cudaStream_t stream) {
  const DeviceGuard guard(device, "select_threshold");
  const Workspace ws = workspace(plan, workspace_memory);
  TablePart part;
  int64_t at = 0, tile = 0;
  for (int64_t i = 0; i < plan.members; ++i) {
    const SelectMember& m = members[i];
    part.members[i % kTablePart] = {m.w, m.g, m.mask, m.n, m.period, at, tile, m.dtype, m.g_dtype, m.key};
    at += m.n;
    tile += (m.n + kSelectTile - 1) / kSelectTile;
    const int64_t filled = i % kTablePart + 1;
    if (filled == kTablePart || i + 1 == plan.members)
      launch("select_begin", select_begin_kernel, {1, kSelectThreads}, stream, ws, part, i + 1 - filled,
             static_cast<int>(filled));
  }
  int even = 16;  // low bits that are zero in all keys: a pass of the sample's search less
  for (const SelectMember& m : members) {
    const bool own = m.key == SelectKey::abs || m.key == SelectKey::identity;
    even = std::min(even, !own || m.dtype == DType::f32 ? 0 : m.dtype == DType::f16 ? 13 : 16);
  }
  const auto sample_blocks = static_cast<unsigned>((plan.sample + kSampleThreads - 1) / kSampleThreads);
  launch("select_sample", select_sample_kernel, {sample_blocks, kSampleThreads}, stream, ws, plan.sample,
         plan.hi_rank, plan.lo_rank, even, result);
  if (plan.direct()) return;
  const LaunchPlan pass = {plan.blocks, kSelectThreads};
  const SelectMember& one = members.front();
  const bool magnitudes = shared_limit(device) >= kCountShared + 1024 && one.dtype != DType::f32 &&
                          std::all_of(members.begin(), members.end(), [&](const SelectMember& m) {
                            return m.key == SelectKey::abs && m.dtype == one.dtype;
                          });
  if (magnitudes) return launch_select_count(ws, one.dtype, k, result, device, stream);
  launch("select_gather", select_gather_kernel, pass, stream, ws, static_cast<Count>(k), result);
  for (int i = 0; i < kSelectPasses; ++i)
    launch("select_radix", select_radix_kernel, pass, stream, ws, i, static_cast<Count>(k), result);
}

cudaError_t kernel_image_status() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, select_gather_kernel);
  cudaGetLastError();
  return status;
}

}  // namespace pared::cuda
