// A block selects from a row: three passes of 11 bits over it, which after the first come from cache, then
// the mask.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/select_device.h"

namespace pared::cuda {
namespace {

struct RowShared {
  uint32_t bins[kSelectBins];
  PickScratch<kSelectThreads, uint32_t> pick;
};

__global__ void __launch_bounds__(kSelectThreads, kSelectBlocksPerMultiprocessor)
    select_rows_kernel(const SelectRowsArgs a, int64_t w_bytes, int64_t g_bytes) {
  PARED_SHARED(RowShared, s);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    Member m = {};
    m.w = static_cast<const char*>(a.w) + row * w_bytes;
    m.g = static_cast<const char*>(a.g) + row * g_bytes;
    m.n = a.cols;
    m.dtype = a.dtype;
    m.g_dtype = a.g_dtype;
    m.key = a.key;
    uint8_t* const mask = a.mask + row * a.cols;
    uint32_t base = 0, last = 0xffffffffu, rank = static_cast<uint32_t>(a.k), equal = 0, nans = 0;
    bool first = true;
    while (a.k > 0 || (first && a.nans)) {
      const int shift = digit_shift(base, last);
      for (int i = thread; i < kSelectBins; i += kSelectThreads) s.bins[i] = 0;
      __syncthreads();
      for (int64_t i = thread; i < a.cols; i += kSelectThreads) {
        const int32_t key = key_at(m, i);
        if (first) nans += key == kSelectNan;
        const uint32_t u = ordered(key) - base;
        if (u <= last - base) count_bin(s.bins, u >> shift);
      }
      __syncthreads();
      first = false;
      if (a.k == 0) break;
      const Picked<uint32_t> p = pick_bin<kSelectThreads>(s.bins, rank, s.pick);
      rank -= p.above;
      equal = p.count;
      narrow(base, last, p.bin, shift);
      if (shift == 0) break;
    }
    if (a.nans) {
      nans = warp_sum(nans);
      if (thread % 32 == 0 && nans) atomicAdd(reinterpret_cast<unsigned long long*>(a.nans), nans);
    }
    // `rank` is now how many of the `equal` keys are selected; with k = 0 nothing is.
    const int32_t threshold = a.k > 0 ? from_ordered(base) : INT32_MAX;
    if (a.k == 0 || rank == equal) {
      for (int64_t i = thread; i < a.cols; i += kSelectThreads) mask[i] = key_at(m, i) >= threshold;
    } else {
      uint32_t left = rank;
      for (int64_t begin = 0; begin < a.cols; begin += kSelectThreads) {
        const int64_t i = begin + thread;
        const int32_t key = i < a.cols ? key_at(m, i) : kSelectNone;
        uint32_t ties;
        const uint32_t before = block_prefix<kSelectThreads>(uint32_t{key == threshold}, s.pick.sums, ties);
        if (i < a.cols) mask[i] = key > threshold || (key == threshold && before < left);
        left -= min(left, ties);
      }
    }
    __syncthreads();  // the next row clears the bins
  }
}

}  // namespace

void select_mask_rows(const SelectRowsArgs& a, int device, cudaStream_t stream) {
  const DeviceGuard guard(device, "select_mask_rows");
  if (a.rows == 0 || a.cols == 0) return;
  constexpr int64_t kMostBlocks = 1 << 20;
  launch("select_mask_rows", select_rows_kernel,
         {static_cast<unsigned>(std::min(a.rows, kMostBlocks)), kSelectThreads}, stream, a,
         a.stride * dtype_size(a.dtype), a.g_stride * dtype_size(a.g_dtype));
}

}  // namespace pared::cuda
