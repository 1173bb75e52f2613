// Which kernel takes a block-sparse product, and the one for every device: the dense products' pipeline on a
// list of blocks: a stage takes 128 bytes of the reduction from wherever the blocks' columns are, so that
// narrow blocks share one and wide ones take several. Items of equal size keep all multiprocessors busy,
// whatever the rows hold.
#include <atomic>

#include "core/check.h"
#include "cuda/block_sparse.h"
#include "cuda/block_sparse_sums.h"
#include "cuda/device.h"
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
  finish_tile<T>(p, item, counter_bytes, first_token, shared, sums);
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

std::atomic<int> forced_kernel{-1};

// The rows of tokens of the wgmma kernel's tile, 0 where mma.sync serves.
int wgmma_rows(const BlockSparseProduct& p, int device) {
  const int forced = forced_kernel, item_bytes = p.w.dtype == DType::i8 ? 1 : 2;
  const int64_t limit = int64_t{1} << 31;  // of the copy engine's coordinates
  if (!block_sparse_wgmma(device) || forced == 0 || p.w.block_rows < 64 ||
      p.w.block_cols * item_bytes % kStepBytes || block_sparse_tile(p.tokens) == kBlockSparseFewTokens ||
      p.w.cols * item_bytes >= limit || p.tokens >= limit || p.x_stride < p.w.cols ||
      !p.w.values)  // of rows that overlap, or no block, there is no tensor map
    return 0;
  // The larger reads the blocks half as often, where it leaves no multiprocessor idle. For tokens that fit
  // into the smaller the workspace has no room for its sums.
  if (p.tokens <= kBlockSparseManyTokens) return kBlockSparseManyTokens;
  if (forced > 0) return forced;
  const int64_t tiles = p.item_count * ((p.tokens + 255) / 256);
  return tiles >= multiprocessors(device) ? 256 : 128;
}

}  // namespace

void force_block_sparse_kernel(int kernel) { forced_kernel = kernel; }

bool block_sparse_wgmma(int device) {
#ifdef PARED_SM90A
  return capability(device) == 90;
#else
  static_cast<void>(device);
  return false;
#endif
}

void block_sparse_product(const BlockSparseProduct& p, int device, cudaStream_t stream) {
  if (p.tokens == 0 || p.w.outputs == 0) return;
  const DeviceGuard guard(device, "block_sparse");
#ifdef PARED_SM90A
  if (const int rows = wgmma_rows(p, device)) return wgmma::block_sparse(p, rows, stream);
#endif
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
