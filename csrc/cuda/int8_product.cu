// The int8 product: which kernel takes it, and the one on mma.sync, for every device from sm_80. There stages
// of 128 bytes of the reduction come by cp.async into swizzled shared memory, fragments by ldmatrix, without
// bank conflicts on either way. The sums go through shared memory to the epilogue, where a thread has
// consecutive outputs of one token.
#include <atomic>

#include "core/check.h"
#include "cuda/device.h"
#include "cuda/epilogue.h"
#include "cuda/int8.h"
#include "cuda/int8_wgmma.h"
#include "cuda/launch.h"
#include "cuda/mma_tile.h"
#include "cuda/ptx.h"
#include "cuda/ticket.h"

namespace pared::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kStepBytes == kInt8StepBytes);

template <int kTile, int kWarpsM>
using TileOf = Tile<kInt8Tiles[kTile].rows, kInt8Tiles[kTile].columns, kInt8Tiles[kTile].stages, kWarpsM,
                    kThreads / 32 / kWarpsM>;

// Copies rows [first, first + kRows) of one step; what lies beyond the matrix becomes zero.
template <int kRows>
__device__ __forceinline__ void copy_rows(unsigned char* stage, const int8_t* x, int64_t stride,
                                          int64_t first, int64_t rows, int64_t step, int64_t cols) {
  constexpr int kTotal = kRows * kChunks;
#pragma unroll
  for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    if (kTotal % kThreads && at >= kTotal) break;
    const int r = at / kChunks, chunk = at % kChunks;
    const int64_t c = step * kStepBytes + chunk * kChunk;
    const bool inside = first + r < rows && c < cols;
    ptx::copy_async<kChunk>(stage + chunk_at(r, chunk), inside ? x + (first + r) * stride + c : x,
                            inside ? kChunk : 0);
  }
}

// The other blocks' sums of this tile, for the block that is the last to finish; false for the others.
template <class T>
__device__ bool reduce_splits(int32_t (&sums)[T::kMmaM][T::kMmaN][4], const Int8Plan& plan, Ticket launch,
                              uint8_t* workspace, int64_t tile) {
  constexpr int64_t kCount = int64_t{T::kRows} * T::kColumns;
  auto* counter = reinterpret_cast<Ticket*>(workspace) + tile;
  const Ticket seen = threadIdx.x == 0 ? __ldcg(counter) : 0;
  auto* of_tile = reinterpret_cast<int32_t*>(workspace + plan.counters_bytes) + tile * plan.splits * kCount;
  const int mine = static_cast<int>(blockIdx.y);
  int32_t* out = of_tile + mine * kCount + threadIdx.x;
#pragma unroll
  for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < T::kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) __stcg(out + ((m * T::kMmaN + n) * 4 + i) * kThreads, sums[m][n][i]);
  if (!last_of(counter, seen, launch, static_cast<uint32_t>(plan.splits), [] { __syncthreads(); }))
    return false;
  for (int s = 0; s < plan.splits; ++s) {
    if (s == mine) continue;
    const int32_t* in = of_tile + s * kCount + threadIdx.x;
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
      for (int n = 0; n < T::kMmaN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += __ldcg(in + ((m * T::kMmaN + n) * 4 + i) * kThreads);
  }
  return true;
}

__device__ __forceinline__ float dequantize(const Int8Product& a, int32_t sum, float x_scale, int64_t n) {
  if (a.correction)
    sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(a.correction[n]));
  const float scaled = __fmul_rn(__fmul_rn(__int2float_rn(sum), x_scale), a.w_scales[n]);
  return activate(__fadd_rn(scaled, a.bias ? a.bias[n] : 0.0f), a.activation);
}

// Four consecutive outputs of one token, `count` of them inside the matrix.
template <class Y>
__device__ __forceinline__ void store_four(const Int8Product& a, int4 sums, int64_t m, int64_t n, int count) {
  const int32_t in[4] = {sums.x, sums.y, sums.z, sums.w};
  Four<Y> out;
  if constexpr (sizeof(Y) == 4 && !std::is_same<Y, float>::value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out.at[i] = in[i];
  } else {
    const float x_scale = a.x_scales[m];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      out.at[i] = narrow<Y>(i < count ? dequantize(a, in[i], x_scale, n + i) : 0.0f);
  }
  store_first(static_cast<Y*>(a.y) + m * a.y_stride + n, out, count);
}

template <class T, class Y>
__global__ void __launch_bounds__(kThreads)
    int8_product_kernel(const Int8Product a, const Int8Plan plan, const Ticket number) {
  PARED_DYNAMIC_SHARED(shared);
  // Blocks that run at the same time share operands in L2: eight tiles of tokens, then the next outputs.
  constexpr int64_t kGroup = 8;
  const int64_t tile = blockIdx.x, group = tile / (kGroup * plan.tiles_n);
  const int64_t group_rows = plan.tiles_m - group * kGroup < kGroup ? plan.tiles_m - group * kGroup : kGroup;
  const int64_t in_group = tile - group * kGroup * plan.tiles_n;
  const int64_t first_m = (group * kGroup + in_group % group_rows) * T::kRows;
  const int64_t first_n = in_group / group_rows * T::kColumns;
  const int64_t begin = plan.steps * blockIdx.y / plan.splits,
                end = plan.steps * (blockIdx.y + 1) / plan.splits;
  const auto issue = [&](int64_t step) {
    if (step < end) {
      unsigned char* stage = shared + (step - begin) % T::kStages * T::kStageBytes;
      copy_rows<T::kRows>(stage, a.a, a.a_stride, first_m, a.tokens, step, a.cols);
      copy_rows<T::kColumns>(stage + T::kRows * kStepBytes, a.b, a.b_stride, first_n, a.outputs, step,
                             a.cols);
    }
    ptx::copy_commit();
  };
  int32_t sums[T::kMmaM][T::kMmaN][4] = {};
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) issue(begin + s);
  for (int64_t step = begin; step < end; ++step) {
    ptx::copy_wait<T::kStages - 2>();
    __syncthreads();  // the stage is here for all, and the one that is filled next has been read by all
    issue(step + T::kStages - 1);
    multiply_stage<T, MmaS8>(sums, shared + (step - begin) % T::kStages * T::kStageBytes);
  }
  ptx::copy_wait<0>();
  if (plan.splits > 1 && !reduce_splits<T>(sums, plan, number, a.workspace, tile)) return;
  __syncthreads();  // the stages are read: their memory takes the sums
  auto* staged = reinterpret_cast<int32_t*>(shared);
  stage_sums<T>(staged, sums);
  __syncthreads();
  constexpr int kFours = T::kColumns / 4;
  for (int at = static_cast<int>(threadIdx.x); at < T::kRows * kFours; at += kThreads) {
    const int r = at / kFours, c = at % kFours * 4;
    const int64_t m = first_m + r, n = first_n + c;
    if (m >= a.tokens || n >= a.outputs) continue;
    const int count = a.outputs - n < 4 ? static_cast<int>(a.outputs - n) : 4;
    store_four<Y>(a, *reinterpret_cast<const int4*>(staged + r * T::kSumStride + c), m, n, count);
  }
}

template <class T, class Y>
void launch_tile(const Int8Product& a, const Int8Plan& plan, cudaStream_t stream, const char* name) {
  launch(name, int8_product_kernel<T, Y>,
         {dim3(static_cast<unsigned>(plan.tiles_m * plan.tiles_n), static_cast<unsigned>(plan.splits)),
          kThreads, T::kShared},
         stream, a, plan, launch_number());
}

template <class Y>
void launch_product(const Int8Product& a, const Int8Plan& plan, cudaStream_t stream, const char* name) {
  switch (plan.tile) {
    case 0: return launch_tile<TileOf<0, 1>, Y>(a, plan, stream, name);
    case 1: return launch_tile<TileOf<1, 1>, Y>(a, plan, stream, name);
    case 2: return launch_tile<TileOf<2, 2>, Y>(a, plan, stream, name);
    default: return launch_tile<TileOf<3, 2>, Y>(a, plan, stream, name);
  }
}

std::atomic<int> forced_tile{-1};

#ifdef PARED_CUTLASS
// The wgmma tile of this product, -1 where mma.sync serves.
int wgmma_tile(const Int8Product& a, int device) {
  const int forced = forced_tile;
  if (!int8_wgmma(device) || !a.w_scales || (forced >= 0 && forced < kInt8TileCount)) return -1;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2, limit = int64_t{1} << 31;
  // What its copies by the bulk engine and its 32-bit sizes ask for.
  if (reinterpret_cast<uintptr_t>(a.y) % 16 || a.y_stride * size % 16 || a.cols == 0 || a.tokens >= limit ||
      a.outputs >= limit)
    return -1;
  return forced >= 0 ? forced : int8_wgmma_tile(a.tokens, a.outputs, multiprocessors(device));
}
#endif

}  // namespace

void force_int8_tile(int tile) { forced_tile = tile; }
int forced_int8_tile() { return forced_tile; }

bool int8_wgmma(int device) {
#ifdef PARED_CUTLASS
  return capability(device) == 90;
#else
  static_cast<void>(device);
  return false;
#endif
}

void int8_product(const Int8Product& a, int device, cudaStream_t stream) {
  if (a.tokens == 0 || a.outputs == 0) return;
  const DeviceGuard guard(device, "int8_product");
#ifdef PARED_CUTLASS
  constexpr decltype(&wgmma::int8_128x128) kWgmma[] = {
#define PARED_TILE(rows, columns, cost) &wgmma::int8_##rows##x##columns,
      PARED_INT8_WGMMA_TILES(PARED_TILE)
#undef PARED_TILE
  };
  if (const int tile = wgmma_tile(a, device); tile >= kInt8TileCount)
    return kWgmma[tile - kInt8TileCount](a, device, stream);
#endif
  const int forced = forced_tile;
  const Int8Plan plan =
      plan_int8(a.tokens, a.outputs, a.cols, multiprocessors(device), forced < kInt8TileCount ? forced : -1);
  PARED_CHECK(plan.tiles_m * plan.tiles_n < (int64_t{1} << 31), "x: expected fewer than 2^31 tiles of ",
              kInt8Tiles[plan.tile].rows, " x ", kInt8Tiles[plan.tile].columns, " outputs");
  if (!a.w_scales) return launch_product<int32_t>(a, plan, stream, "int8_product_s32");
  switch (a.dtype) {
    case DType::f32: return launch_product<float>(a, plan, stream, "int8_product_f32");
    case DType::f16: return launch_product<__half>(a, plan, stream, "int8_product_f16");
    default: return launch_product<__nv_bfloat16>(a, plan, stream, "int8_product_bf16");
  }
}

}  // namespace pared::cuda
