// The dense products' pipeline on a list of blocks: a stage takes 128 bytes of the reduction from wherever
// the blocks' columns are, so that narrow blocks share one and wide ones take several. Items of equal size
// keep all multiprocessors busy, whatever the rows hold.
#include "core/check.h"
#include "cuda/block_sparse.h"
#include "cuda/device.h"
#include "cuda/epilogue.h"
#include "cuda/launch.h"
#include "cuda/mma_tile.h"
#include "cuda/ptx.h"

namespace pared::cuda {
namespace {

// Stage `step` of an item: rows of x, then rows of the blocks.
template <class T>
__device__ __forceinline__ void copy_stage(unsigned char* stage, const BlockSparseProduct& p,
                                           const BlockItem& item, int64_t first_token, int64_t step,
                                           int item_bytes) {
  const int per_block = p.w.block_cols * item_bytes / kChunk;  // chunks of a block's row
  static_assert(T::kThreads % kChunks == 0);
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;  // the same for all of a thread's rows
  const int64_t at = step * kChunks + chunk;
  const int64_t block = item.begin + at / per_block;
  const bool inside = block < item.end;
  const int64_t within = at % per_block * kChunk;  // bytes
  const int64_t column =
      inside ? __ldg(p.w.columns + block) * int64_t{p.w.block_cols} * item_bytes + within : 0;
  const int64_t left = p.w.cols * item_bytes - column;  // the last block may stand out of the matrix
  const int valid = !inside || left <= 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
  const auto* x = static_cast<const unsigned char*>(p.x);
  const auto* w = static_cast<const unsigned char*>(p.w.values);
  constexpr int kRowsAtOnce = T::kThreads / kChunks;
  const int first_row = static_cast<int>(threadIdx.x) / kChunks;
#pragma unroll
  for (int i = 0; i < (T::kRows + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
    const int r = first_row + i * kRowsAtOnce;
    if (T::kRows % kRowsAtOnce && r >= T::kRows) break;
    const int64_t token = first_token + r;
    const bool some = token < p.tokens && valid > 0;
    ptx::copy_async<kChunk>(stage + chunk_at(r, chunk),
                            some ? x + token * p.x_stride * item_bytes + column : x, some ? valid : 0);
  }
  const int64_t row_bytes = int64_t{p.w.block_cols} * item_bytes;
#pragma unroll
  for (int i = 0; i < (T::kColumns + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
    const int r = first_row + i * kRowsAtOnce;
    if (T::kColumns % kRowsAtOnce && r >= T::kColumns) break;
    ptx::copy_async<kChunk>(stage + T::kRows * kStepBytes + chunk_at(r, chunk),
                            inside ? w + (block * T::kColumns + r) * row_bytes + within : w,
                            inside ? kChunk : 0);
  }
}

// Where an item is a part of a row: true for the last to finish, which then has the sums of all parts.
template <class T, class Sum>
__device__ bool reduce_parts(const BlockSparseProduct& p, const BlockItem& item, int64_t counter_bytes,
                             Sum (&sums)[T::kMmaM][T::kMmaN][4]) {
  constexpr int64_t kCount = int64_t{T::kRows} * T::kColumns;
  const int64_t tile = blockIdx.y, tiles = gridDim.y;
  auto* counter = reinterpret_cast<uint32_t*>(p.workspace) + item.slot * tiles + tile;
  auto* parts = reinterpret_cast<Sum*>(p.workspace + counter_bytes) + threadIdx.x;
  const auto part_at = [&](int part) { return parts + ((item.slot + part) * tiles + tile) * kCount; };
  Sum* out = part_at(item.part);
#pragma unroll
  for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < T::kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) __stcg(out + ((m * T::kMmaN + n) * 4 + i) * T::kThreads, sums[m][n][i]);
  __threadfence();
  __syncthreads();
  PARED_SHARED(bool[1], last);
  if (threadIdx.x == 0) last[0] = atomicAdd(counter, 1u) + 1 == static_cast<uint32_t>(item.parts);
  __syncthreads();
  if (!last[0]) return false;
  __threadfence();
#pragma unroll
  for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < T::kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0;
  for (int s = 0; s < item.parts; ++s) {
    const Sum* in = part_at(s);
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
      for (int n = 0; n < T::kMmaN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += __ldcg(in + ((m * T::kMmaN + n) * 4 + i) * T::kThreads);
  }
  return true;
}

__device__ __forceinline__ float finish(const BlockSparseProduct& p, int32_t sum, int64_t m, int64_t n) {
  const float scaled = __fmul_rn(__fmul_rn(__int2float_rn(sum), p.x_scales[m]), p.w_scales[n]);
  return activate(__fadd_rn(scaled, p.bias ? p.bias[n] : 0.0f), p.activation);
}
__device__ __forceinline__ float finish(const BlockSparseProduct& p, float sum, int64_t, int64_t n) {
  return activate(p.bias ? __fadd_rn(sum, p.bias[n]) : sum, p.activation);
}

template <class T, class Y, class Sum>
__device__ void store_tile(const BlockSparseProduct& p, const Sum* staged, int64_t first_token,
                           int64_t first_output) {
  constexpr int kFours = T::kColumns / 4;
  for (int at = static_cast<int>(threadIdx.x); at < T::kRows * kFours; at += T::kThreads) {
    const int r = at / kFours, c = at % kFours * 4;
    const int64_t m = first_token + r, n = first_output + c;
    if (m >= p.tokens || n >= p.w.outputs) continue;
    const int count = p.w.outputs - n < 4 ? static_cast<int>(p.w.outputs - n) : 4;
    Four<Y> out;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out.at[i] = narrow<Y>(i < count ? finish(p, staged[r * T::kSumStride + c + i], m, n + i) : 0.0f);
    store_first(static_cast<Y*>(p.y) + m * p.y_stride + n, out, count);
  }
}

template <class T, class Mma>
__global__ void __launch_bounds__(T::kThreads)
    block_sparse_kernel(const BlockSparseProduct p, const int64_t counter_bytes) {
  PARED_DYNAMIC_SHARED(shared);
  constexpr int kItemBytes = std::is_same<Mma, MmaS8>::value ? 1 : 2;
  const BlockItem item = p.items[blockIdx.x];
  const int64_t first_token = int64_t{blockIdx.y} * T::kRows;
  const int64_t bytes = int64_t{item.end - item.begin} * p.w.block_cols * kItemBytes;
  const int64_t steps = (bytes + kStepBytes - 1) / kStepBytes;
  const auto issue = [&](int64_t step) {
    if (step < steps)
      copy_stage<T>(shared + step % T::kStages * T::kStageBytes, p, item, first_token, step, kItemBytes);
    ptx::copy_commit();
  };
  typename Mma::Sum sums[T::kMmaM][T::kMmaN][4] = {};
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) issue(s);
  for (int64_t step = 0; step < steps; ++step) {
    ptx::copy_wait<T::kStages - 2>();
    __syncthreads();  // the stage is here for all, and the one that is filled next has been read by all
    issue(step + T::kStages - 1);
    multiply_stage<T, Mma>(sums, shared + step % T::kStages * T::kStageBytes);
  }
  ptx::copy_wait<0>();
  if (item.parts > 1 && !reduce_parts<T>(p, item, counter_bytes, sums)) return;
  __syncthreads();  // the stages are read: their memory takes the sums
  auto* staged = reinterpret_cast<typename Mma::Sum*>(shared);
  stage_sums<T>(staged, sums);
  __syncthreads();
  const int64_t first_output = int64_t{item.row} * T::kColumns;
  switch (p.dtype) {
    case DType::f32: return store_tile<T, float>(p, staged, first_token, first_output);
    case DType::f16: return store_tile<T, __half>(p, staged, first_token, first_output);
    default: return store_tile<T, __nv_bfloat16>(p, staged, first_token, first_output);
  }
}

template <class T>
void launch_tile(const BlockSparseProduct& p, cudaStream_t stream, const char* name) {
  const int64_t tiles = (p.tokens + T::kRows - 1) / T::kRows;
  PARED_CHECK(tiles <= 65535, "x: expected at most ", int64_t{65535} * T::kRows, " tokens, got ", p.tokens);
  const BlockSparseWorkspace workspace = block_sparse_workspace(p.tokens, p.slots, T::kColumns);
  if (p.slots) check(cudaMemsetAsync(p.workspace, 0, static_cast<size_t>(workspace.counters), stream), name);
  const LaunchPlan plan{dim3(static_cast<unsigned>(p.item_count), static_cast<unsigned>(tiles)), T::kThreads,
                        T::kShared};
  switch (p.w.dtype) {
    case DType::i8: return launch(name, block_sparse_kernel<T, MmaS8>, plan, stream, p, workspace.counters);
    case DType::f16: return launch(name, block_sparse_kernel<T, MmaF16>, plan, stream, p, workspace.counters);
    default: return launch(name, block_sparse_kernel<T, MmaBf16>, plan, stream, p, workspace.counters);
  }
}

}  // namespace

void block_sparse_product(const BlockSparseProduct& p, int device, cudaStream_t stream) {
  if (p.tokens == 0 || p.w.outputs == 0) return;
  const DeviceGuard guard(device, "block_sparse");
  constexpr int kFew = kBlockSparseFewTokens, kMany = kBlockSparseManyTokens;
  if (block_sparse_tile(p.tokens) == kFew) {
    switch (p.w.block_rows) {
      case 16: return launch_tile<Tile<kFew, 16, 4, 1, 1>>(p, stream, "block_sparse_16x16");
      case 32: return launch_tile<Tile<kFew, 32, 4, 1, 2>>(p, stream, "block_sparse_16x32");
      case 64: return launch_tile<Tile<kFew, 64, 4, 1, 4>>(p, stream, "block_sparse_16x64");
      default: return launch_tile<Tile<kFew, 128, 4, 1, 8>>(p, stream, "block_sparse_16x128");
    }
  }
  switch (p.w.block_rows) {
    case 16: return launch_tile<Tile<kMany, 16, 3, 4, 1>>(p, stream, "block_sparse_128x16");
    case 32: return launch_tile<Tile<kMany, 32, 3, 4, 1>>(p, stream, "block_sparse_128x32");
    case 64: return launch_tile<Tile<kMany, 64, 3, 4, 2>>(p, stream, "block_sparse_128x64");
    default: return launch_tile<Tile<kMany, 128, 3, 2, 4>>(p, stream, "block_sparse_128x128");
  }
}

}  // namespace pared::cuda
