// Block-sparse products on wgmma, for sm_90a: a warp has the copy engine bring boxes of activations and of
// blocks, two warpgroups multiply what has arrived, each half of the tile's tokens with all outputs of the
// row of blocks.
#include "core/check.h"
#include "cuda/block_sparse.h"
#include "cuda/block_sparse_sums.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/mma_tile.h"
#include "cuda/ptx.h"
#include "cuda/tensor_map.h"

namespace pared::cuda::wgmma {
namespace {

constexpr int kGroup = 128;  // threads of a warpgroup

template <int kRows_, int kColumns_, int kStages_, int kBlocks_>
struct WgmmaTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;     // at once on a multiprocessor
  static constexpr int kThreads = 2 * kGroup;  // that multiply; a warp more copies
  static constexpr int kMmaM = kRows / 2 / 64, kMmaN = kColumns / 8;
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;
  static constexpr int kSumStride = kColumns + 8;
  static_assert(kRows * kSumStride * 4 <= kStages * kStageBytes, "the sums go where the stages were");
  // The swizzle asks for stages at multiples of 1024 bytes; the barriers come behind them.
  static constexpr size_t kShared = 1024 + kStages * (kStageBytes + 2 * sizeof(uint64_t));

  static __device__ __forceinline__ int first_row() {
    return static_cast<int>(threadIdx.x) / kGroup * (kRows / 2);
  }
  static __device__ __forceinline__ int sum_row(int m) {
    return first_row() + m * 64 + static_cast<int>(threadIdx.x) % kGroup / 32 * 16;
  }
  static __device__ __forceinline__ int sum_column(int n) { return n * 8; }
  static __device__ __forceinline__ void sync() { ptx::barrier_sync(1, kThreads); }
};

struct OfS8 {
  using Sum = int32_t;
  static constexpr int kItemBytes = 1;
  template <class C>
  static __device__ __forceinline__ void multiply(C& c, uint64_t a, uint64_t b) {
    ptx::wgmma_s8(c, a, b);
  }
};
struct OfF16 {
  using Sum = float;
  static constexpr int kItemBytes = 2;
  template <class C>
  static __device__ __forceinline__ void multiply(C& c, uint64_t a, uint64_t b) {
    ptx::wgmma_f16(c, a, b);
  }
};
struct OfBf16 {
  using Sum = float;
  static constexpr int kItemBytes = 2;
  template <class C>
  static __device__ __forceinline__ void multiply(C& c, uint64_t a, uint64_t b) {
    ptx::wgmma_bf16(c, a, b);
  }
};

template <class T, class Of>
__global__ void __launch_bounds__(T::kThreads + 32, T::kBlocks)
    block_sparse_wgmma_kernel(const __grid_constant__ CUtensorMap x_map,
                              const __grid_constant__ CUtensorMap w_map, const BlockSparseProduct p,
                              const int64_t counter_bytes, const Ticket number) {
  PARED_DYNAMIC_SHARED(dynamic);
  unsigned char* const shared = dynamic + (-ptx::shared_address(dynamic) & 1023);
  auto* const full = reinterpret_cast<uint64_t*>(shared + T::kStages * T::kStageBytes);
  uint64_t* const empty = full + T::kStages;
  const BlockItem item = p.items[blockIdx.x];
  const int64_t first_token = int64_t{blockIdx.y} * T::kRows;
  const int per_block = p.w.block_cols * Of::kItemBytes / kStepBytes;
  const int64_t steps = int64_t{item.end - item.begin} * per_block;
  if (threadIdx.x == 0) {
    for (int s = 0; s < T::kStages; ++s) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], T::kThreads / 32);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= T::kThreads) {
    if (ptx::lane() != 0) return;
    int stage = 0, round = 0;
    for (int block = item.begin; block < item.end; ++block) {
      const int column = __ldg(p.w.columns + block) * p.w.block_cols * Of::kItemBytes;
      for (int part = 0; part < per_block; ++part) {
        if (round > 0) ptx::mbarrier_wait(&empty[stage], (round - 1) % 2);
        unsigned char* const to = shared + stage * T::kStageBytes;
        ptx::mbarrier_arrive_expect(&full[stage], T::kStageBytes);
        // The block first: its column may still be on the way.
        ptx::copy_tensor(to + T::kRows * kStepBytes, &w_map, part * kStepBytes, block * T::kColumns,
                         &full[stage]);
        ptx::copy_tensor(to, &x_map, column + part * kStepBytes, static_cast<int>(first_token), &full[stage]);
        if (++stage == T::kStages) stage = 0, ++round;
      }
    }
    return;
  }
  typename Of::Sum sums[T::kMmaM][T::kMmaN][4] = {};
  int stage = 0, parity = 0, last = 0;
  for (int64_t step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(&full[stage], parity);
    const unsigned char* const x = shared + stage * T::kStageBytes;
    const uint64_t a = ptx::wgmma_operand(x + T::first_row() * kStepBytes);
    const uint64_t b = ptx::wgmma_operand(x + T::kRows * kStepBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepBytes / kMmaBytes; ++k)
#pragma unroll
      for (int m = 0; m < T::kMmaM; ++m)
        Of::multiply(sums[m], a + (m * 64 * kStepBytes + k * kMmaBytes) / 16, b + k * kMmaBytes / 16);
    ptx::wgmma_commit();
    // The products before these are done: their stage may be filled again.
    ptx::wgmma_wait<1>();
    if (step > 0 && ptx::lane() == 0) ptx::mbarrier_arrive(&empty[last]);
    last = stage;
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
  ptx::wgmma_wait<0>();
  finish_tile<T>(p, item, counter_bytes, number, first_token, shared, sums);
}

template <class T, class Of>
void launch_of(const BlockSparseProduct& p, cudaStream_t stream, const char* name) {
  const int64_t tiles = (p.tokens + T::kRows - 1) / T::kRows;
  PARED_CHECK(tiles <= 65535, "x: expected at most ", int64_t{65535} * T::kRows, " tokens, got ", p.tokens);
  const BlockSparseWorkspace workspace = block_sparse_workspace(p.tokens, p.slots, T::kColumns);
  const int64_t item = Of::kItemBytes, block_bytes = p.w.block_cols * item;
  const CUtensorMap x = tensor_map(p.x, p.w.cols * item, p.tokens, p.x_stride * item, T::kRows, name);
  const CUtensorMap w =
      tensor_map(p.w.values, block_bytes, p.w.blocks * T::kColumns, block_bytes, T::kColumns, name);
  launch(
      name, block_sparse_wgmma_kernel<T, Of>,
      {dim3(static_cast<unsigned>(p.item_count), static_cast<unsigned>(tiles)), T::kThreads + 32, T::kShared},
      stream, x, w, p, workspace.counters, launch_number());
}

template <class T>
void launch_tile(const BlockSparseProduct& p, cudaStream_t stream, const char* name) {
  switch (p.w.dtype) {
    case DType::i8: return launch_of<T, OfS8>(p, stream, name);
    case DType::f16: return launch_of<T, OfF16>(p, stream, name);
    default: return launch_of<T, OfBf16>(p, stream, name);
  }
}

}  // namespace

void block_sparse(const BlockSparseProduct& p, int rows, cudaStream_t stream) {
  const bool wide = p.w.block_rows == 128;
  if (rows == 256) {
    if (wide) return launch_tile<WgmmaTile<256, 128, 4, 1>>(p, stream, "block_sparse_wgmma_256x128");
    return launch_tile<WgmmaTile<256, 64, 4, 1>>(p, stream, "block_sparse_wgmma_256x64");
  }
  if (wide) return launch_tile<WgmmaTile<128, 128, 3, 2>>(p, stream, "block_sparse_wgmma_128x128");
  return launch_tile<WgmmaTile<128, 64, 4, 2>>(p, stream, "block_sparse_wgmma_128x64");
}

}  // namespace pared::cuda::wgmma
