// Scores of the blocks of a matrix, and a mask of the elements from one of the blocks; between them the
// blocks are selected as elements are.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/select_device.h"

namespace pared::cuda {
namespace {

// Columns whose sums a block of threads holds; a place in 32 stays free, so that threads which walk through a
// power of two of them each are not after the same bank.
constexpr int kEach = 8, kColumns = kSelectThreads * kEach;
__device__ __forceinline__ int place(int column) { return column + column / 32; }

template <class T>
__device__ __forceinline__ float score(SelectKey key, T w, float g) {
  const float v = widen(w);
  switch (key) {
    case SelectKey::identity: return v;
    case SelectKey::square: return __fmul_rn(v, v);
    case SelectKey::product: return fabsf(__fmul_rn(v, g));
    default: return fabsf(v);
  }
}

// The columns of a block of the matrix, all taps of c channels, are consecutive: a unit. A block of threads
// takes `units` of them, kColumns or fewer columns, or one that is longer, piece by piece: the sums so far
// are then in `scores`, each the same thread's every time.
template <class T>
__global__ void __launch_bounds__(kSelectThreads, 4)
    select_block_scores_kernel(const SelectMatrix x, const SelectBlocks blocks, int64_t units, int64_t across,
                               float* scores) {
  PARED_SHARED(float[kColumns + kColumns / 32], sums);
  const int thread = static_cast<int>(threadIdx.x);
  const auto taps = static_cast<int>(blocks.taps);
  const int64_t unit = blocks.c * taps, chunks = (across + units - 1) / units;
  const int64_t total = (x.rows + blocks.r - 1) / blocks.r * chunks;
  for (int64_t at = blockIdx.x; at < total; at += gridDim.x) {
    const int64_t block_row = at / chunks, first_unit = at % chunks * units;
    const int64_t row = block_row * blocks.r, rows = min(blocks.r, x.rows - row);
    const auto mine = static_cast<int>(min(units, across - first_unit));
    const int64_t begin = first_unit * unit, end = min(x.cols, begin + mine * unit);
    float* const out = scores + block_row * taps * across + first_unit;
    for (int64_t piece = begin; piece < end; piece += kColumns) {
      float down[kEach] = {};
#pragma unroll 1
      for (int64_t r = 0; r < rows; ++r) {
        const T* w = static_cast<const T*>(x.w) + (row + r) * x.stride + piece + thread;
        Member factors = {};
        factors.key = x.key;
        factors.g_dtype = x.g_dtype;
        factors.g =
            static_cast<const char*>(x.g) + (row + r) * x.g_stride * (x.g_dtype == DType::f32 ? 4 : 2);
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const int64_t column = piece + thread + j * kSelectThreads;
          if (column < end)
            down[j] = __fadd_rn(down[j], score(x.key, w[j * kSelectThreads], factor(factors, column)));
        }
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) sums[place(thread + j * kSelectThreads)] = down[j];
      __syncthreads();
      const auto length = static_cast<int>(min(int64_t{kColumns}, end - piece));
      for (int i = thread; i < mine * taps; i += kSelectThreads) {
        const int u = i / taps, tap = i % taps;
        float* const to = out + int64_t{tap} * across + u;
        float sum = piece == begin ? 0.0f : *to;
        // The first column of this tap in the piece, and the end of the unit.
        const int64_t from = begin + u * unit + tap - piece;
        int column = static_cast<int>(from >= 0 ? from : (from % taps + taps) % taps);
        const auto stop = static_cast<int>(min(int64_t{length}, begin + (u + 1) * unit - piece));
        for (; column < stop; column += taps) sum = __fadd_rn(sum, sums[place(column)]);
        *to = sum;
      }
      __syncthreads();  // the next piece takes the memory
    }
  }
}

constexpr int kBytes = 16;  // of the mask, a thread

__global__ void __launch_bounds__(kSelectThreads)
    select_expand_blocks_kernel(int64_t elements, int64_t cols, const SelectBlocks blocks, int64_t across,
                                const uint8_t* chosen, uint8_t* mask) {
  const int64_t step = int64_t{gridDim.x} * kSelectThreads * kBytes;
  for (int64_t i = (int64_t{blockIdx.x} * kSelectThreads + threadIdx.x) * kBytes; i < elements; i += step) {
    int64_t row = i / cols;
    auto column = static_cast<int>(i - row * cols);
    const auto taps = static_cast<int>(blocks.taps);
    // Of the element: its tap, its block's column and its channel in there.
    int tap = column % taps;
    int64_t channel = column / taps, block = channel / blocks.c;
    channel -= block * blocks.c;
    const uint8_t* from = chosen + row / blocks.r * taps * across;
    alignas(kBytes) uint8_t bytes[kBytes];
    const int count = static_cast<int>(min(int64_t{kBytes}, elements - i));
#pragma unroll
    for (int j = 0; j < kBytes; ++j) {
      bytes[j] = j < count ? __ldg(from + int64_t{tap} * across + block) : uint8_t{0};
      if (++tap == taps) {
        tap = 0;
        if (++channel == blocks.c) channel = 0, ++block;
      }
      if (++column == cols) {
        column = tap = 0;
        channel = block = 0;
        from = chosen + ++row / blocks.r * taps * across;
      }
    }
    if (count == kBytes && reinterpret_cast<uintptr_t>(mask) % kBytes == 0) {
      *reinterpret_cast<uint4*>(mask + i) = *reinterpret_cast<const uint4*>(bytes);
    } else {
#pragma unroll
      for (int j = 0; j < kBytes; ++j)
        if (j < count) mask[i + j] = bytes[j];
    }
  }
}

constexpr int64_t kMostBlocks = 1 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
void launch_scores(const SelectMatrix& x, const SelectBlocks& blocks, float* scores, cudaStream_t stream) {
  const int64_t across = ceil_div(x.cols / blocks.taps, blocks.c);
  const int64_t units = std::clamp<int64_t>(kColumns / (blocks.c * blocks.taps), 1, across);
  const int64_t total = ceil_div(x.rows, blocks.r) * ceil_div(across, units);
  launch("select_block_scores", select_block_scores_kernel<T>,
         {static_cast<unsigned>(std::min(total, kMostBlocks)), kSelectThreads}, stream, x, blocks, units,
         across, scores);
}

}  // namespace

void select_block_scores(const SelectMatrix& x, const SelectBlocks& blocks, float* scores, int device,
                         cudaStream_t stream) {
  const DeviceGuard guard(device, "select_block_scores");
  if (x.rows == 0 || x.cols == 0) return;
  switch (x.dtype) {
    case DType::f32: return launch_scores<float>(x, blocks, scores, stream);
    case DType::f16: return launch_scores<__half>(x, blocks, scores, stream);
    default: return launch_scores<__nv_bfloat16>(x, blocks, scores, stream);
  }
}

void select_expand_blocks(int64_t rows, int64_t cols, const SelectBlocks& blocks, const uint8_t* chosen,
                          uint8_t* mask, int device, cudaStream_t stream) {
  const DeviceGuard guard(device, "select_expand_blocks");
  const int64_t elements = rows * cols;
  if (elements == 0) return;
  const int64_t wanted = ceil_div(elements, int64_t{kSelectThreads} * kBytes);
  launch("select_expand_blocks", select_expand_blocks_kernel,
         {static_cast<unsigned>(std::min(wanted, kMostBlocks)), kSelectThreads}, stream, elements, cols,
         blocks, ceil_div(cols / blocks.taps, blocks.c), chosen, mask);
}

}  // namespace pared::cuda
