// Masks of the k largest of every group of channels. A thread selects from a group that fits into its
// registers by counting what is larger; a block from a longer one (a row) by three passes of 11 bits, which
// after the first come from cache.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/select_device.h"

namespace pared::cuda {
namespace {

// Group number `at`, counted over rows, groups and taps, the tap innermost.
struct Group {
  int64_t row;
  int first, count;  // of its columns, which are `taps` apart
};
__device__ __forceinline__ Group group_at(const SelectGroupsArgs& a, int64_t at, int64_t groups) {
  const auto taps = static_cast<int>(a.taps);
  const int64_t each = groups * taps;
  const int64_t row = at / each;
  const auto rest = static_cast<int>(at - row * each);
  const int group = rest / taps, channel = group * static_cast<int>(a.group);
  const int channels = static_cast<int>(a.x.cols) / taps;
  return {row, channel * taps + rest % taps, min(static_cast<int>(a.group), channels - channel)};
}

__device__ __forceinline__ Member row_of(const SelectMatrix& x, int64_t row, int64_t w_bytes,
                                         int64_t g_bytes) {
  Member m = {};
  m.w = static_cast<const char*>(x.w) + row * w_bytes;
  m.g = static_cast<const char*>(x.g) + row * g_bytes;
  m.n = x.cols;
  m.dtype = x.dtype;
  m.g_dtype = x.g_dtype;
  m.key = x.key;
  return m;
}

__device__ __forceinline__ void add_nans(int64_t* total, uint32_t nans) {
  nans = warp_sum(nans);
  if (threadIdx.x % 32 == 0 && nans) atomicAdd(reinterpret_cast<unsigned long long*>(total), nans);
}

// ---- groups of up to kMost elements, one a thread

template <class T, int kMost>
struct alignas(kMost * sizeof(T) < 16 ? kMost * sizeof(T) : 16) Several {
  T at[kMost];
};

template <class T, int kMost>
__global__ void __launch_bounds__(kSelectThreads)
    select_small_groups_kernel(const SelectGroupsArgs a, int64_t groups, int64_t w_bytes, int64_t g_bytes) {
  const int64_t total = a.x.rows * groups * a.taps, step = int64_t{gridDim.x} * kSelectThreads;
  const auto taps = static_cast<int>(a.taps);
  uint32_t nans = 0;
  for (int64_t at = int64_t{blockIdx.x} * kSelectThreads + threadIdx.x; at < total; at += step) {
    const Group group = group_at(a, at, groups);
    const Member m = row_of(a.x, group.row, w_bytes, g_bytes);
    const T* w = static_cast<const T*>(m.w) + group.first;
    const bool whole = group.count == kMost && taps == 1;
    T values[kMost];
    if (whole && reinterpret_cast<uintptr_t>(w) % alignof(Several<T, kMost>) == 0) {
      const Several<T, kMost> loaded = *reinterpret_cast<const Several<T, kMost>*>(w);
#pragma unroll
      for (int j = 0; j < kMost; ++j) values[j] = loaded.at[j];
    } else {
#pragma unroll
      for (int j = 0; j < kMost; ++j) values[j] = w[j < group.count ? j * taps : 0];
    }
    int32_t keys[kMost];
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      const float g = j < group.count ? factor(m, group.first + j * taps) : 0.0f;
      keys[j] = j < group.count ? make_key(m.key, widen(values[j]), g) : kSelectNone;
      nans += keys[j] == kSelectNan;
    }
    // How many keys come before each: larger ones, and equal ones of a lower index.
    int before[kMost] = {};
#pragma unroll
    for (int i = 0; i < kMost; ++i)
#pragma unroll
      for (int j = i + 1; j < kMost; ++j) {
        const bool first = keys[i] >= keys[j];
        before[j] += first;
        before[i] += !first;
      }
    uint8_t* const mask = a.mask + group.row * a.x.cols + group.first;
    Several<uint8_t, kMost> selected;
#pragma unroll
    for (int j = 0; j < kMost; ++j) selected.at[j] = before[j] < a.k;
    if (whole && reinterpret_cast<uintptr_t>(mask) % alignof(Several<uint8_t, kMost>) == 0) {
      *reinterpret_cast<Several<uint8_t, kMost>*>(mask) = selected;
    } else {
#pragma unroll
      for (int j = 0; j < kMost; ++j)
        if (j < group.count) mask[j * taps] = selected.at[j];
    }
  }
  if (a.nans) add_nans(a.nans, nans);
}

// ---- longer groups, one a block

struct GroupShared {
  alignas(16) uint32_t bins[kSelectBins];
  PickScratch<kSelectThreads, uint32_t> pick;
};

__global__ void __launch_bounds__(kSelectThreads, kSelectBlocksPerMultiprocessor)
    select_groups_kernel(const SelectGroupsArgs a, int64_t groups, int64_t w_bytes, int64_t g_bytes) {
  PARED_SHARED(GroupShared, s);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t total = a.x.rows * groups * a.taps;
  for (int64_t at = blockIdx.x; at < total; at += gridDim.x) {
    const Group group = group_at(a, at, groups);
    const Member m = row_of(a.x, group.row, w_bytes, g_bytes);
    uint8_t* const mask = a.mask + group.row * a.x.cols + group.first;
    const int64_t count = group.count, taps = a.taps, k = min(a.k, count);
    const auto key_of = [&](int64_t i) { return key_at(m, group.first + i * taps); };
    uint32_t base = 0, last = 0xffffffffu, rank = static_cast<uint32_t>(k), equal = 0, nans = 0;
    bool first = true;
    while (k > 0 || (first && a.nans)) {
      const int shift = digit_shift(base, last);
      for (int i = thread; i < kSelectBins; i += kSelectThreads) s.bins[i] = 0;
      __syncthreads();
      for (int64_t i = thread; i < count; i += kSelectThreads) {
        const int32_t key = key_of(i);
        if (first) nans += key == kSelectNan;
        const uint32_t u = ordered(key) - base;
        if (u <= last - base) count_bin(s.bins, u >> shift);
      }
      __syncthreads();
      first = false;
      if (k == 0) break;
      const Picked<uint32_t> p = pick_bin<kSelectThreads>(s.bins, rank, s.pick);
      rank -= p.above;
      equal = p.count;
      narrow(base, last, p.bin, shift);
      if (shift == 0) break;
    }
    if (a.nans) add_nans(a.nans, nans);
    // `rank` is now how many of the `equal` keys are selected; with k = 0 nothing is.
    const int32_t threshold = k > 0 ? from_ordered(base) : INT32_MAX;
    if (k == 0 || rank == equal) {
      for (int64_t i = thread; i < count; i += kSelectThreads) mask[i * taps] = key_of(i) >= threshold;
    } else {
      uint32_t left = rank;
      for (int64_t begin = 0; begin < count; begin += kSelectThreads) {
        const int64_t i = begin + thread;
        const int32_t key = i < count ? key_of(i) : kSelectNone;
        uint32_t ties;
        const uint32_t before = block_prefix<kSelectThreads>(uint32_t{key == threshold}, s.pick.sums, ties);
        if (i < count) mask[i * taps] = key > threshold || (key == threshold && before < left);
        left -= min(left, ties);
      }
    }
    __syncthreads();  // the next group clears the bins
  }
}

template <class T>
void launch_small(const SelectGroupsArgs& a, int64_t groups, int64_t total, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 1 << 20;
  const int64_t blocks = std::min((total + kSelectThreads - 1) / kSelectThreads, kMostBlocks);
  const LaunchPlan at = {static_cast<unsigned>(blocks), kSelectThreads};
  const int64_t w_bytes = a.x.stride * dtype_size(a.x.dtype),
                g_bytes = a.x.g_stride * dtype_size(a.x.g_dtype);
  const auto start = [&](auto kernel) {
    launch("select_small_groups", kernel, at, stream, a, groups, w_bytes, g_bytes);
  };
  if (a.group <= 4) return start(select_small_groups_kernel<T, 4>);
  if (a.group <= 8) return start(select_small_groups_kernel<T, 8>);
  if (a.group <= 16) return start(select_small_groups_kernel<T, 16>);
  start(select_small_groups_kernel<T, kSelectSmallGroup>);
}

}  // namespace

void select_mask_groups(const SelectGroupsArgs& a, int device, cudaStream_t stream) {
  const DeviceGuard guard(device, "select_mask_groups");
  if (a.x.rows == 0 || a.x.cols == 0) return;
  const int64_t channels = a.x.cols / a.taps, groups = (channels + a.group - 1) / a.group;
  const int64_t total = a.x.rows * groups * a.taps;
  if (a.group <= kSelectSmallGroup) {
    switch (a.x.dtype) {
      case DType::f32: return launch_small<float>(a, groups, total, stream);
      case DType::f16: return launch_small<__half>(a, groups, total, stream);
      default: return launch_small<__nv_bfloat16>(a, groups, total, stream);
    }
  }
  constexpr int64_t kMostBlocks = 1 << 20;
  launch("select_groups", select_groups_kernel,
         {static_cast<unsigned>(std::min(total, kMostBlocks)), kSelectThreads}, stream, a, groups,
         a.x.stride * dtype_size(a.x.dtype), a.x.g_stride * dtype_size(a.x.g_dtype));
}

}  // namespace pared::cuda
