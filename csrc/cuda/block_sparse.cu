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

// Where a thread's chunk of a step lies, the same one for all of its rows.
struct Chunk {
  int at;         // in the stage's rows
  int64_t block;  // of the item's, or behind them: !inside
  int within;     // bytes from the start of a block's row
  bool inside;

  __device__ __forceinline__ Chunk(const BlockSparseProduct& p, const BlockItem& item, int step,
                                   int item_bytes) {
    const auto per_block = static_cast<unsigned>(p.w.block_cols * item_bytes / kChunk);
    at = static_cast<int>(threadIdx.x) % kChunks;
    const auto chunk = static_cast<unsigned>(step * kChunks + at);
    block = int64_t{item.begin} + chunk / per_block;
    within = static_cast<int>(chunk % per_block) * kChunk;
    inside = block < item.end;
  }
};

// A stage is rows of x, then rows of the blocks. These come first: where they are is known before any of the
// blocks' columns has been read.
template <class T>
__device__ __forceinline__ void copy_blocks(unsigned char* stage, const BlockSparseProduct& p,
                                            const Chunk& chunk, int item_bytes) {
  static_assert(T::kThreads % kChunks == 0);
  constexpr int kRowsAtOnce = T::kThreads / kChunks;
  const int first_row = static_cast<int>(threadIdx.x) / kChunks;
  const auto* w = static_cast<const unsigned char*>(p.w.values);
  const int64_t row_bytes = int64_t{p.w.block_cols} * item_bytes;
#pragma unroll
  for (int i = 0; i < (T::kColumns + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
    const int r = first_row + i * kRowsAtOnce;
    if (T::kColumns % kRowsAtOnce && r >= T::kColumns) break;
    ptx::copy_async<kChunk>(stage + T::kRows * kStepBytes + chunk_at(r, chunk.at),
                            chunk.inside ? w + (chunk.block * T::kColumns + r) * row_bytes + chunk.within : w,
                            chunk.inside ? kChunk : 0);
  }
}

template <class T>
__device__ __forceinline__ void copy_tokens(unsigned char* stage, const BlockSparseProduct& p,
                                            const Chunk& chunk, int64_t first_token, int item_bytes) {
  const bool inside = chunk.inside;
  const int64_t column =
      inside ? __ldg(p.w.columns + chunk.block) * int64_t{p.w.block_cols} * item_bytes + chunk.within : 0;
  const int64_t left = p.w.cols * item_bytes - column;  // the last block may stand out of the matrix
  const int valid = !inside || left <= 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
  const auto* x = static_cast<const unsigned char*>(p.x);
  constexpr int kRowsAtOnce = T::kThreads / kChunks;
  const int first_row = static_cast<int>(threadIdx.x) / kChunks;
#pragma unroll
  for (int i = 0; i < (T::kRows + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
    const int r = first_row + i * kRowsAtOnce;
    if (T::kRows % kRowsAtOnce && r >= T::kRows) break;
    const int64_t token = first_token + r;
    const bool some = token < p.tokens && valid > 0;
    ptx::copy_async<kChunk>(stage + chunk_at(r, chunk.at),
                            some ? x + token * p.x_stride * item_bytes + column : x, some ? valid : 0);
  }
}

template <class T, class Mma>
__global__ void __launch_bounds__(T::kThreads)
    block_sparse_kernel(const BlockSparseProduct p, const int64_t counter_bytes, const Ticket number) {
  PARED_DYNAMIC_SHARED(shared);
  constexpr int kItemBytes = std::is_same<Mma, MmaS8>::value ? 1 : 2;
  const BlockItem item = p.items[blockIdx.x];
  const int64_t first_token = int64_t{blockIdx.y} * T::kRows;
  const int64_t bytes = int64_t{item.end - item.begin} * p.w.block_cols * kItemBytes;
  const int steps = static_cast<int>((bytes + kStepBytes - 1) / kStepBytes);
  const auto stage_of = [&](int step) { return shared + step % T::kStages * T::kStageBytes; };
  const auto issue_blocks = [&](int step) {
    if (step < steps) copy_blocks<T>(stage_of(step), p, Chunk(p, item, step, kItemBytes), kItemBytes);
  };
  const auto issue_tokens = [&](int step) {
    if (step < steps)
      copy_tokens<T>(stage_of(step), p, Chunk(p, item, step, kItemBytes), first_token, kItemBytes);
    ptx::copy_commit();
  };
  typename Mma::Sum sums[T::kMmaM][T::kMmaN][4] = {};
#pragma unroll 1
  for (int s = 0; s < T::kStages - 1; ++s) issue_blocks(s);
#pragma unroll 1
  for (int s = 0; s < T::kStages - 1; ++s) issue_tokens(s);
  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<T::kStages - 2>();
    __syncthreads();  // the stage is here for all, and the one that is filled next has been read by all
    issue_blocks(step + T::kStages - 1);
    issue_tokens(step + T::kStages - 1);
    multiply_stage<T, Mma>(sums, stage_of(step));
  }
  ptx::copy_wait<0>();
  finish_tile<T>(p, item, counter_bytes, number, first_token, shared, sums);
}

template <class T>
void launch_tile(const BlockSparseProduct& p, cudaStream_t stream, const char* name) {
  const int64_t tiles = (p.tokens + T::kRows - 1) / T::kRows;
  PARED_CHECK(tiles <= 65535, "x: expected at most ", int64_t{65535} * T::kRows, " tokens, got ", p.tokens);
  const BlockSparseWorkspace workspace = block_sparse_workspace(p.tokens, p.slots, T::kColumns);
  const LaunchPlan plan{dim3(static_cast<unsigned>(p.item_count), static_cast<unsigned>(tiles)), T::kThreads,
                        T::kShared};
  const auto start = [&](auto kernel) {
    launch(name, kernel, plan, stream, p, workspace.counters, launch_number());
  };
  switch (p.w.dtype) {
    case DType::i8: return start(block_sparse_kernel<T, MmaS8>);
    case DType::f16: return start(block_sparse_kernel<T, MmaF16>);
    default: return start(block_sparse_kernel<T, MmaBf16>);
  }
}

std::atomic<int> forced_kernel{-1};

// The rows of tokens of the wgmma kernel's tile, 0 where mma.sync serves.
int wgmma_rows(const BlockSparseProduct& p, int device) {
  const int forced = forced_kernel, item_bytes = p.w.dtype == DType::i8 ? 1 : 2;
  const int64_t limit = int64_t{1} << 31;  // of the copy engine's coordinates
  if (!block_sparse_wgmma(device) || forced == 0 || p.w.block_rows < 64 ||
      p.w.block_cols * item_bytes % kStepBytes || block_sparse_tile(p.tokens) == kBlockSparseFewTokens ||
      p.w.cols * item_bytes >= limit || p.tokens >= limit || p.w.blocks * p.w.block_rows >= limit ||
      p.x_stride < p.w.cols || p.w.blocks == 0)  // of rows that overlap, or no block, there is no tensor map
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
    // What counts is how much of the weight is on its way: 56 to 112 KB a multiprocessor, which has two of
    // these tiles.
    switch (p.w.block_rows) {
      case 16: return launch_tile<Tile<kFew, 16, 16, 1, 1>>(p, stream, "block_sparse_16x16");
      case 32: return launch_tile<Tile<kFew, 32, 8, 1, 2>>(p, stream, "block_sparse_16x32");
      case 64: return launch_tile<Tile<kFew, 64, 8, 1, 4>>(p, stream, "block_sparse_16x64");
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
