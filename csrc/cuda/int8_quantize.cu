// One block a token: a pass for the largest magnitude, a second one, which finds the row in L1, for the
// bytes.
#include "cuda/device.h"
#include "cuda/int8.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace pared::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

// Elements [c, c + kCount) of a row, zeros behind its end. kWide: the row is aligned to 16 bytes.
template <class T, bool kWide, int kCount = 16 / sizeof(T)>
__device__ __forceinline__ void load_elements(float (&v)[kCount], const T* row, int64_t c, int64_t cols) {
  if (kWide && c + kCount <= cols) {
    const uint4 loaded = *reinterpret_cast<const uint4*>(row + c);
    const T* elements = reinterpret_cast<const T*>(&loaded);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = widen(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = c + i < cols ? widen(row[c + i]) : 0.0f;
  }
}

// The largest over the block; all threads get it.
__device__ uint32_t block_max(uint32_t v) {
  PARED_SHARED(uint32_t[kThreads / 32], of_warps);
  v = __reduce_max_sync(0xffffffffu, v);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (ptx::lane() == 0) of_warps[warp] = v;
  __syncthreads();
  v = of_warps[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) v = of_warps[i] > v ? of_warps[i] : v;
  return v;
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const QuantizeRows a) {
  constexpr int kCount = 16 / sizeof(T);
  const int64_t r = blockIdx.x;
  const T* row = static_cast<const T*>(a.x) + r * a.x_stride;
  int8_t* out = a.q + r * a.q_stride;
  float v[kCount];
  uint32_t bits = 0;  // as integers, magnitudes are in order and NaN is above all
  for (int64_t c = int64_t{threadIdx.x} * kCount; c < a.cols; c += kThreads * kCount) {
    load_elements<T, kWide>(v, row, c, a.cols);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t b = __float_as_uint(v[i]) & 0x7fffffffu;
      bits = b > bits ? b : bits;
    }
  }
  bits = block_max(bits);
  const bool finite = bits < 0x7f800000u;
  const float largest = __uint_as_float(bits), nan = __uint_as_float(0x7fc00000u);
  float inverse, low = -127.0f, high = 127.0f, scale;
  int32_t zero = 0;  // of the signed byte
  if (a.scale == 0.0f) {
    const bool some = finite && largest >= kSmallestMax;
    inverse = some ? __fdiv_rn(127.0f, largest) : 0.0f;
    scale = !finite ? nan : some ? __fdiv_rn(largest, 127.0f) : 0.0f;
  } else {
    inverse = __fdiv_rn(1.0f, a.scale);
    scale = finite ? a.scale : nan;
    low = static_cast<float>(a.low - a.zero);
    high = static_cast<float>(a.high - a.zero);
    zero = a.zero - 128;
  }
  if (threadIdx.x == 0) a.scales[r] = scale;
  for (int64_t c = int64_t{threadIdx.x} * kCount; c < a.q_stride; c += kThreads * kCount) {
    load_elements<T, kWide>(v, row, c, a.cols);
    struct alignas(kCount) {
      int8_t at[kCount];
    } bytes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float q = fminf(fmaxf(__fmul_rn(v[i], inverse), low), high);  // NaN becomes low
      bytes.at[i] = c + i < a.cols ? static_cast<int8_t>(__float2int_rn(q) + zero) : int8_t{0};
    }
    *reinterpret_cast<decltype(bytes)*>(out + c) = bytes;
  }
}

template <class T>
void launch_quantize(const QuantizeRows& a, cudaStream_t stream, const char* name) {
  const bool wide = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && a.x_stride * sizeof(T) % 16 == 0;
  const LaunchPlan plan{static_cast<unsigned>(a.rows), kThreads};
  launch(name, wide ? quantize_rows_kernel<T, true> : quantize_rows_kernel<T, false>, plan, stream, a);
}

// One block a row: the reads are a row's consecutive bytes where column_stride is 1.
__global__ void __launch_bounds__(kThreads) pad_rows_kernel(const PadRows a) {
  const int8_t* row = a.x + blockIdx.x * a.x_stride;
  int8_t* out = a.out + blockIdx.x * a.out_stride;
  for (int64_t c = threadIdx.x; c < a.out_stride; c += kThreads)
    out[c] = c < a.cols ? row[c * a.column_stride] : int8_t{0};
}

}  // namespace

void quantize_rows(const QuantizeRows& a, int device, cudaStream_t stream) {
  if (a.rows == 0) return;
  const DeviceGuard guard(device, "quantize_rows");
  switch (a.dtype) {
    case DType::f32: return launch_quantize<float>(a, stream, "quantize_rows_f32");
    case DType::f16: return launch_quantize<__half>(a, stream, "quantize_rows_f16");
    default: return launch_quantize<__nv_bfloat16>(a, stream, "quantize_rows_bf16");
  }
}

void pad_rows(const PadRows& a, int device, cudaStream_t stream) {
  if (a.rows == 0 || a.out_stride == 0) return;
  const DeviceGuard guard(device, "pad_rows");
  launch("pad_rows", pad_rows_kernel, {static_cast<unsigned>(a.rows), kThreads}, stream, a);
}

}  // namespace pared::cuda
