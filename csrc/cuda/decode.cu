// Each warp streams its own blocks of the weight through shared memory, and expands them into the A operand
// of mma.sync: outputs are the rows, tokens the columns. Warps meet only at the end, to add up their sums.
#include "core/check.h"
#include "cuda/decode.h"
#include "cuda/device.h"
#include "cuda/epilogue.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace pared::cuda {
namespace {

constexpr int kThreads = kDecodeWarps * 32;
constexpr int kFragments = 4;  // of a block, down and across
constexpr int kMaxStages = 4;

// ---- from global to shared memory, a block a stage, by one warp

struct Ring {
  unsigned char* stages;  // of this warp
  uint64_t* arrived;      // a barrier a stage; bulk copies alone
  int bytes, count;
  bool bulk;

  __device__ unsigned char* stage(int64_t i) const { return stages + i % count * bytes; }

  __device__ void init() const {
    if (bulk && ptx::lane() == 0) {
      for (int s = 0; s < count; ++s) ptx::mbarrier_init(arrived + s, 1);
      ptx::fence_barrier_init();
    }
    __syncwarp();
  }

  // Copy number i, of 16 * `units` bytes. The warp has read what was in the stage before.
  __device__ void begin(int64_t i, const uint8_t* from, uint32_t units) const {
#if defined(PARED_CUDA_EMULATED) || __CUDA_ARCH__ >= 900
    if (bulk) {
      if (ptx::lane() == 0) {
        uint64_t* bar = arrived + i % count;
        ptx::mbarrier_arrive_expect(bar, static_cast<int>(units) * 16);
        ptx::copy_bulk(stage(i), from, static_cast<int>(units) * 16, bar);
      }
      return;
    }
#endif
    for (uint32_t u = static_cast<uint32_t>(ptx::lane()); u < units; u += 32)
      ptx::copy_async<16>(stage(i) + u * 16, from + int64_t{u} * 16);
  }
  // After each copy that begins or would have begun.
  __device__ void commit() const {
    if (!bulk) ptx::copy_commit();
  }
  // Waits for copy i, the oldest of the `count` under way.
  __device__ void wait(int64_t i) const {
#if defined(PARED_CUDA_EMULATED) || __CUDA_ARCH__ >= 900
    if (bulk) {
      ptx::mbarrier_wait(arrived + i % count, static_cast<int>(i / count & 1));
      return;
    }
#endif
    if (count == 4) {
      ptx::copy_wait<3>();
    } else {
      ptx::copy_wait<1>();
    }
    __syncwarp();  // the other lanes' parts
  }
};

// ---- pairs of values as the tensor cores take them

__device__ __forceinline__ uint32_t pair_bits(float a, float b, __half) {
  const __half2 two = __floats2half2_rn(a, b);
  return __half_as_ushort(two.x) | static_cast<uint32_t>(__half_as_ushort(two.y)) << 16;
}
__device__ __forceinline__ uint32_t pair_bits(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
  return __bfloat16_as_ushort(two.x) | static_cast<uint32_t>(__bfloat16_as_ushort(two.y)) << 16;
}
// Exact: 2^23 + 128 + q is one, in a float's lowest byte.
__device__ __forceinline__ float byte_value(uint32_t byte) {
  return __uint_as_float(0x4b000000u | (byte ^ 0x80u)) - 8388736.0f;
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  ptx::mma_f16(c, a, b);
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __nv_bfloat16) {
  ptx::mma_bf16(c, a, b);
}

// ---- expansion: the four fragments of row r of a block, as registers

// Bits set in each byte.
__device__ __forceinline__ uint32_t byte_counts(uint32_t v) {
  v -= v >> 1 & 0x55555555u;
  v = (v & 0x33333333u) + (v >> 2 & 0x33333333u);
  return (v + (v >> 4)) & 0x0f0f0f0fu;
}

template <class T, class Value>  // Value: as it is stored
struct BitmapBlock {
  uint4 masks;
  const Value* values;
  uint32_t first = 0;  // value of the fragments that come next

  __device__ explicit BitmapBlock(const unsigned char* stage)
      : masks(reinterpret_cast<const uint4*>(stage)[ptx::lane()]),
        values(reinterpret_cast<const Value*>(stage + kDecodeMaskBytes)) {}

  // For r = 0, 1, 2, 3 in this order.
  __device__ __forceinline__ void expand(int r, uint32_t (&a)[kFragments][4]) {
    const uint32_t mask = r == 0 ? masks.x : r == 1 ? masks.y : r == 2 ? masks.z : masks.w;
    // Where the lane's values begin in each fragment: a scan over the lanes of four counts at a time. Up to
    // lane 30 no sum exceeds 248; the last lane's inclusive one may carry, and loses the carry again.
    const uint32_t own = byte_counts(mask);
    uint32_t before = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t left = __shfl_up_sync(0xffffffffu, before, d);
      if (ptx::lane() >= d) before += left;
    }
    before -= own;
    const uint32_t last_before = __shfl_sync(0xffffffffu, before, 31),
                   last_own = __shfl_sync(0xffffffffu, own, 31);
#pragma unroll
    for (int s = 0; s < kFragments; ++s) {
      const uint32_t bits = mask >> (8 * s);
      const Value* v = values + first + (before >> (8 * s) & 0xff);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool low = bits >> (2 * i) & 1, high = bits >> (2 * i + 1) & 1;
        const uint32_t at_low = low ? load(v) : 0u;
        v += low;
        const uint32_t at_high = high ? load(v) : 0u;
        v += high;
        a[s][i] = pair(at_low, at_high);
      }
      first += (last_before >> (8 * s) & 0xff) + (last_own >> (8 * s) & 0xff);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t load(const Value* v) { return *v; }
  static __device__ __forceinline__ uint32_t pair(uint32_t low, uint32_t high) {
    if constexpr (sizeof(Value) == 2) return low | high << 16;
    else return pair_bits(byte_value(low), byte_value(high), T{});
  }
};

template <class T>
struct DenseBlock {
  const uint4* values;  // of this lane

  __device__ explicit DenseBlock(const unsigned char* stage)
      : values(reinterpret_cast<const uint4*>(stage) + ptx::lane()) {}

  __device__ __forceinline__ void expand(int r, uint32_t (&a)[kFragments][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 loaded = values[(r * 2 + half) * 32];
      const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t two = words[i / 2] >> (i % 2 * 16);
        a[half * 2 + i / 4][i % 4] = pair_bits(byte_value(two & 0xff), byte_value(two >> 8 & 0xff), T{});
      }
    }
  }
};

template <class T, DecodeFormat kFormat>
struct BlockOf {
  using type = BitmapBlock<T, uint16_t>;
};
template <class T>
struct BlockOf<T, DecodeFormat::bitmap8> {
  using type = BitmapBlock<T, uint8_t>;
};
template <class T>
struct BlockOf<T, DecodeFormat::dense8> {
  using type = DenseBlock<T>;
};

// ---- the product

// The lane's 16 columns of token `token`: b[s] is the operand of fragment s.
template <class T>
__device__ __forceinline__ void load_activations(const DecodeProduct& p, int64_t token, int64_t column,
                                                 bool wide, uint32_t (&b)[kFragments][2]) {
  const auto* row = static_cast<const uint16_t*>(p.x) + token * p.x_stride + column;
  uint32_t words[8];
  if (token < p.tokens && wide && column + 16 <= p.w.cols) {
    const uint4 low = __ldg(reinterpret_cast<const uint4*>(row)),
                high = __ldg(reinterpret_cast<const uint4*>(row) + 1);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      uint32_t two = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (token < p.tokens && column + i + j < p.w.cols)
          two |= static_cast<uint32_t>(__ldg(row + i + j)) << (16 * j);
      words[i / 2] = two;
    }
  }
#pragma unroll
  for (int s = 0; s < kFragments; ++s) b[s][0] = words[2 * s], b[s][1] = words[2 * s + 1];
}

// Outputs of one block row: adds up what the blocks of threads that share it have found. False for all but
// the last of them, which has the sums of all, in the order of the splits, in `sums`.
__device__ bool reduce_splits(const DecodePlan& plan, uint8_t* workspace, float* sums) {
  const int count = kDecodeBlock * plan.tokens;
  auto* counter = reinterpret_cast<uint32_t*>(workspace) + blockIdx.x;
  float* of_row =
      reinterpret_cast<float*>(workspace + plan.counters_bytes) + int64_t{blockIdx.x} * plan.splits * count;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    __stcg(of_row + int64_t{blockIdx.y} * count + i, sums[i]);
  __threadfence();
  __syncthreads();
  PARED_SHARED(bool[1], last);
  if (threadIdx.x == 0) last[0] = atomicAdd(counter, 1u) + 1 == static_cast<uint32_t>(plan.splits);
  __syncthreads();
  if (!last[0]) return false;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    float sum = 0.0f;
    for (int s = 0; s < plan.splits; ++s) sum += __ldcg(of_row + int64_t{s} * count + i);
    sums[i] = sum;
  }
  __syncthreads();
  return true;
}

// Shared memory admits about three blocks a multiprocessor: registers need not be saved for more.
template <class T, DecodeFormat kFormat, int kTiles>  // kTiles: of 8 tokens
__global__ void __launch_bounds__(kThreads, kTiles == 4 ? 2 : 3)
    decode_kernel(const DecodeProduct p, const DecodePlan plan) {
  PARED_DYNAMIC_SHARED(shared);
  PARED_SHARED(uint64_t[kDecodeWarps * kMaxStages], barriers);
  const int warp = static_cast<int>(threadIdx.x) / 32, g = ptx::lane() / 4, t = ptx::lane() % 4;
  const Ring ring{shared + warp * plan.stages * plan.stage_bytes, barriers + warp * kMaxStages,
                  plan.stage_bytes, plan.stages, p.bulk};
  ring.init();
  // The warps of a block of threads take turns on its part of the row.
  const int64_t begin = plan.block_cols * blockIdx.y / plan.splits + warp,
                end = plan.block_cols * (blockIdx.y + 1) / plan.splits;
  const int64_t mine = begin < end ? (end - begin + kDecodeWarps - 1) / kDecodeWarps : 0;
  const uint32_t* offsets = p.w.offsets + blockIdx.x * plan.block_cols;
  const auto issue = [&](int64_t i) {
    if (i < mine) {
      const int64_t block = begin + i * kDecodeWarps;
      const uint32_t at = __ldg(offsets + block), units = __ldg(offsets + block + 1) - at;
      ring.begin(i, p.w.blocks + int64_t{at} * 16, units);
    }
    ring.commit();
  };
  for (int i = 0; i < plan.stages; ++i) issue(i);

  const bool wide = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % 8 == 0;
  float sums[kFragments][kTiles][4] = {};
  for (int64_t i = 0; i < mine; ++i) {
    uint32_t b[kTiles][kFragments][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      load_activations<T>(p, n * 8 + g, (begin + i * kDecodeWarps) * kDecodeBlock + 16 * t, wide, b[n]);
    ring.wait(i);
    typename BlockOf<T, kFormat>::type block(ring.stage(i));
#pragma unroll
    for (int r = 0; r < kFragments; ++r) {
      uint32_t a[kFragments][4];
      block.expand(r, a);
#pragma unroll
      for (int s = 0; s < kFragments; ++s)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) mma(sums[r][n], a[s], b[n][s], T{});
    }
    __syncwarp();  // all lanes have read the stage
    issue(i + plan.stages);
  }
  if (!p.bulk) ptx::copy_wait<0>();
  __syncthreads();  // the stages are read: their memory takes the sums, [warp][token][output]
  auto* staged = reinterpret_cast<float*>(shared);
  constexpr int kCount = kDecodeBlock * kTiles * 8;
#pragma unroll
  for (int r = 0; r < kFragments; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        staged[warp * kCount + (n * 8 + 2 * t + i % 2) * kDecodeBlock + r * 16 + g + i / 2 * 8] =
            sums[r][n][i];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kThreads) {
    float sum = staged[i];
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) sum += staged[w * kCount + i];
    staged[i] = sum;
  }
  __syncthreads();
  if (plan.splits > 1 && !reduce_splits(plan, p.workspace, staged)) return;
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kThreads) {
    const int64_t token = i / kDecodeBlock, output = int64_t{blockIdx.x} * kDecodeBlock + i % kDecodeBlock;
    if (token >= p.tokens || output >= p.w.outputs) continue;
    float y = staged[i];
    if (p.scales) y = __fmul_rn(y, p.scales[output]);
    if (p.bias) y = __fadd_rn(y, p.bias[output]);
    static_cast<T*>(p.y)[token * p.y_stride + output] = narrow<T>(activate(y, p.activation));
  }
}

// ---- the dense weight again

template <class T, DecodeFormat kFormat>
__global__ void __launch_bounds__(32)
    expand_kernel(const DecodeWeight w, const float* scales, T* out, int64_t block_cols) {
  const int64_t block_row = blockIdx.x / block_cols, block_col = blockIdx.x % block_cols;
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  // Few values a lane, each read once: straight from global memory.
  typename BlockOf<T, kFormat>::type block(const_cast<unsigned char*>(w.blocks) +
                                           int64_t{w.offsets[blockIdx.x]} * 16);
#pragma unroll
  for (int r = 0; r < kFragments; ++r) {
    uint32_t a[kFragments][4];
    block.expand(r, a);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t output = block_row * kDecodeBlock + 16 * r + g + 8 * half,
                    column = block_col * kDecodeBlock + 16 * t;
      if (output >= w.outputs) continue;
      const float scale = scales ? scales[output] : 1.0f;
#pragma unroll
      for (int c = 0; c < 16; ++c) {
        const auto bits = static_cast<uint16_t>(a[c / 4][half + c / 2 % 2 * 2] >> (c % 2 * 16));
        if (column + c < w.cols) {
          T v;
          memcpy(&v, &bits, 2);
          out[output * w.cols + column + c] = scales ? narrow<T>(__fmul_rn(static_cast<float>(v), scale)) : v;
        }
      }
    }
  }
}

template <class T, DecodeFormat kFormat>
void launch_decode(const DecodeProduct& p, const DecodePlan& plan, cudaStream_t stream, const char* name) {
  const LaunchPlan at{dim3(static_cast<unsigned>(plan.block_rows), static_cast<unsigned>(plan.splits)),
                      kThreads, static_cast<size_t>(plan.shared_bytes)};
  switch (plan.tokens) {
    case 8: return launch(name, decode_kernel<T, kFormat, 1>, at, stream, p, plan);
    case 16: return launch(name, decode_kernel<T, kFormat, 2>, at, stream, p, plan);
    default: return launch(name, decode_kernel<T, kFormat, 4>, at, stream, p, plan);
  }
}

template <class T>
void launch_decode(const DecodeProduct& p, const DecodePlan& plan, cudaStream_t stream) {
  switch (p.w.format) {
    case DecodeFormat::bitmap16:
      return launch_decode<T, DecodeFormat::bitmap16>(p, plan, stream, "decode_bitmap16");
    case DecodeFormat::bitmap8:
      return launch_decode<T, DecodeFormat::bitmap8>(p, plan, stream, "decode_bitmap8");
    default: return launch_decode<T, DecodeFormat::dense8>(p, plan, stream, "decode_dense8");
  }
}

template <class T>
void launch_expand(const DecodeWeight& w, const float* scales, void* out, unsigned blocks, int64_t block_cols,
                   cudaStream_t stream) {
  T* y = static_cast<T*>(out);
  const LaunchPlan at{blocks, 32};
  switch (w.format) {
    case DecodeFormat::bitmap16:
      return launch("expand_bitmap16", expand_kernel<T, DecodeFormat::bitmap16>, at, stream, w, scales, y,
                    block_cols);
    case DecodeFormat::bitmap8:
      return launch("expand_bitmap8", expand_kernel<T, DecodeFormat::bitmap8>, at, stream, w, scales, y,
                    block_cols);
    default:
      return launch("expand_dense8", expand_kernel<T, DecodeFormat::dense8>, at, stream, w, scales, y,
                    block_cols);
  }
}

}  // namespace

DecodePlan decode_plan(const DecodeWeight& w, int64_t tokens, int device) {
  return plan_decode(tokens, w.outputs, w.cols, w.largest_block, multiprocessors(device),
                     shared_limit(device));
}

void decode_product(const DecodeProduct& p, int device, cudaStream_t stream) {
  if (p.tokens == 0 || p.w.outputs == 0) return;
  const DeviceGuard guard(device, "decode_product");
  for (int64_t first = 0; first < p.tokens; first += kDecodeMaxTokens) {
    DecodeProduct some = p;
    some.tokens = std::min<int64_t>(kDecodeMaxTokens, p.tokens - first);
    some.x = static_cast<const uint16_t*>(p.x) + first * p.x_stride;
    some.y = static_cast<uint16_t*>(p.y) + first * p.y_stride;
    const DecodePlan plan = decode_plan(p.w, some.tokens, device);
    if (plan.splits > 1)
      check(cudaMemsetAsync(p.workspace, 0, static_cast<size_t>(plan.counters_bytes), stream),
            "decode_product");
    if (p.w.dtype == DType::f16) launch_decode<__half>(some, plan, stream);
    else launch_decode<__nv_bfloat16>(some, plan, stream);
  }
}

void decode_expand(const DecodeWeight& w, const float* scales, void* out, int device, cudaStream_t stream) {
  const int64_t rows = (w.outputs + kDecodeBlock - 1) / kDecodeBlock,
                cols = (w.cols + kDecodeBlock - 1) / kDecodeBlock;
  if (rows * cols == 0) return;
  const DeviceGuard guard(device, "decode_expand");
  const auto blocks = static_cast<unsigned>(rows * cols);
  if (w.dtype == DType::f16) return launch_expand<__half>(w, scales, out, blocks, cols, stream);
  launch_expand<__nv_bfloat16>(w, scales, out, blocks, cols, stream);
}

}  // namespace pared::cuda
