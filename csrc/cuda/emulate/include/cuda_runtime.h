// CUDA's names for the emulator, in place of the toolkit's header of this name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/emulate/simt.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (::pared::cuda::emulate::thread_index)
#define blockIdx (::pared::cuda::emulate::block_index)
#define blockDim (::pared::cuda::emulate::block_size)
#define gridDim (::pared::cuda::emulate::grid_size)
inline constexpr int warpSize = 32;

// The place of the caller, for messages.
#define PARED_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define PARED_WHERE (::pared::cuda::emulate::Where{file, line})

// ---- vectors

#define PARED_VECTORS(name, type, align2, align4)                  \
  struct name##1 { type x; };                                      \
  struct alignas(align2) name##2 { type x, y; };                   \
  struct name##3 { type x, y, z; };                                \
  struct alignas(align4) name##4 { type x, y, z, w; };             \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
PARED_VECTORS(char, signed char, 2, 4)
PARED_VECTORS(uchar, unsigned char, 2, 4)
PARED_VECTORS(short, short, 4, 8)
PARED_VECTORS(ushort, unsigned short, 4, 8)
PARED_VECTORS(int, int, 8, 16)
PARED_VECTORS(uint, unsigned, 8, 16)
PARED_VECTORS(float, float, 8, 16)
PARED_VECTORS(longlong, long long, 16, 16)
PARED_VECTORS(ulonglong, unsigned long long, 16, 16)
PARED_VECTORS(double, double, 16, 16)
#undef PARED_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- synchronisation

inline void __syncthreads(PARED_HERE) { pared::cuda::emulate::barrier(0, 0, false, PARED_WHERE); }
inline int __syncthreads_count(int p, PARED_HERE) {
  return pared::cuda::emulate::barrier(0, 0, p != 0, PARED_WHERE);
}
inline int __syncthreads_or(int p, PARED_HERE) {
  return pared::cuda::emulate::barrier(0, 0, p != 0, PARED_WHERE) > 0;
}
inline int __syncthreads_and(int p, PARED_HERE) {
  return pared::cuda::emulate::barrier(0, 0, p == 0, PARED_WHERE) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

namespace pared::cuda::emulate {

// The operands of a warp operation that takes a T from each lane and gives each an R.
template <class T, class R = T>
struct Exchange {
  T value;
  int lane, source;
  R result;
  const char* error;
};

template <class T, class R, class F>
R exchange(const char* kind, uint32_t mask, T value, int source, F, Where where) {
  Exchange<T, R> mine{value, lane(), source, R{}, nullptr};
  collective(
      kind, mask, &mine,
      [](void** all, uint32_t lanes) {
        for (int i = 0; i < 32; ++i)
          if (lanes >> i & 1) F::apply(reinterpret_cast<Exchange<T, R>**>(all), lanes, i);
      },
      where);
  if (mine.error) fail(mine.error, where);
  return mine.result;
}

// Shuffle: lanes of `width` exchange among each other; `source` is the lane read, or -1 for one's own.
struct Shuffle {
  template <class T>
  static void apply(Exchange<T>** all, uint32_t, int i) {
    const Exchange<T>* from = all[all[i]->source];
    if (from) all[i]->result = from->value;
    else all[i]->error = "a shuffle reads from a lane that is not in its mask";
  }
};
template <class T>
T shuffle(const char* kind, uint32_t mask, T v, int source, Where where) {
  return exchange<T, T>(kind, mask, v, source, Shuffle{}, where);
}

struct Ballot {
  static void apply(Exchange<bool, uint32_t>** all, uint32_t lanes, int i) {
    for (int j = 0; j < 32; ++j)
      if (lanes >> j & 1 && all[j]->value) all[i]->result |= 1u << j;
  }
};
struct Match {
  template <class T>
  static void apply(Exchange<T, uint32_t>** all, uint32_t lanes, int i) {
    for (int j = 0; j < 32; ++j)
      if (lanes >> j & 1 && std::memcmp(&all[j]->value, &all[i]->value, sizeof(T)) == 0)
        all[i]->result |= 1u << j;
  }
};
template <class Op>
struct Reduce {
  template <class T>
  static void apply(Exchange<T>** all, uint32_t lanes, int i) {
    bool first = true;
    for (int j = 0; j < 32; ++j) {
      if (!(lanes >> j & 1)) continue;
      all[i]->result = first ? all[j]->value : Op::of(all[i]->result, all[j]->value);
      first = false;
    }
  }
};
struct Add {
  template <class T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return a > b ? a : b;
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};

inline constexpr char kSync[] = "__syncwarp", kShuffle[] = "__shfl_sync", kUp[] = "__shfl_up_sync",
                      kDown[] = "__shfl_down_sync", kXor[] = "__shfl_xor_sync", kVote[] = "a vote",
                      kMatch[] = "__match_any_sync", kReduce[] = "a warp reduction";

}  // namespace pared::cuda::emulate

inline void __syncwarp(unsigned mask = 0xffffffffu, PARED_HERE) {
  pared::cuda::emulate::collective(
      pared::cuda::emulate::kSync, mask, nullptr, [](void**, uint32_t) {}, PARED_WHERE);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, PARED_HERE) {
  const int lane = pared::cuda::emulate::lane();
  return pared::cuda::emulate::shuffle(pared::cuda::emulate::kShuffle, mask, v,
                                       (lane & ~(width - 1)) | (source & (width - 1)), PARED_WHERE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, PARED_HERE) {
  const int lane = pared::cuda::emulate::lane(), at = lane & (width - 1), d = static_cast<int>(delta);
  return pared::cuda::emulate::shuffle(pared::cuda::emulate::kUp, mask, v, at >= d ? lane - d : lane,
                                       PARED_WHERE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, PARED_HERE) {
  const int lane = pared::cuda::emulate::lane(), at = lane & (width - 1), d = static_cast<int>(delta);
  return pared::cuda::emulate::shuffle(pared::cuda::emulate::kDown, mask, v, at + d < width ? lane + d : lane,
                                       PARED_WHERE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, PARED_HERE) {
  const int lane = pared::cuda::emulate::lane(), other = lane ^ bits;
  const bool inside = (other & ~(width - 1)) <= (lane & ~(width - 1));
  return pared::cuda::emulate::shuffle(pared::cuda::emulate::kXor, mask, v, inside ? other : lane,
                                       PARED_WHERE);
}
inline unsigned __ballot_sync(unsigned mask, int p, PARED_HERE) {
  return pared::cuda::emulate::exchange<bool, uint32_t>(pared::cuda::emulate::kVote, mask, p != 0, 0,
                                                        pared::cuda::emulate::Ballot{}, PARED_WHERE);
}
inline int __any_sync(unsigned mask, int p, PARED_HERE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, PARED_HERE) { return __ballot_sync(mask, p, file, line) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v, PARED_HERE) {
  return pared::cuda::emulate::exchange<T, uint32_t>(pared::cuda::emulate::kMatch, mask, v, 0,
                                                     pared::cuda::emulate::Match{}, PARED_WHERE);
}
#define PARED_REDUCE(name, op)                                                                            \
  template <class T>                                                                                      \
  T __reduce_##name##_sync(unsigned mask, T v, PARED_HERE) {                                              \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);                                               \
    return pared::cuda::emulate::exchange<T, T>(pared::cuda::emulate::kReduce, mask, v, 0,                \
                                                pared::cuda::emulate::Reduce<pared::cuda::emulate::op>{}, \
                                                PARED_WHERE);                                             \
  }
PARED_REDUCE(add, Add)
PARED_REDUCE(min, Min)
PARED_REDUCE(max, Max)
PARED_REDUCE(and, And)
PARED_REDUCE(or, Or)
PARED_REDUCE(xor, Xor)
#undef PARED_REDUCE

// ---- atomics: one thread runs at a time

#define PARED_ATOMIC(name, expression)                                                            \
  template <class T>                                                                              \
  PARED_UNSEEN T name(T* at, std::common_type_t<T> v, PARED_HERE) {                               \
    pared::cuda::emulate::touch(at, sizeof(T), pared::cuda::emulate::Touch::atomic, PARED_WHERE); \
    const T old = pared::cuda::emulate::aligned(at, PARED_WHERE);                                 \
    *at = static_cast<T>(expression);                                                             \
    return old;                                                                                   \
  }
PARED_ATOMIC(atomicAdd, old + v)
PARED_ATOMIC(atomicSub, old - v)
PARED_ATOMIC(atomicMin, v < old ? v : old)
PARED_ATOMIC(atomicMax, v > old ? v : old)
PARED_ATOMIC(atomicAnd, old& v)
PARED_ATOMIC(atomicOr, old | v)
PARED_ATOMIC(atomicXor, old ^ v)
PARED_ATOMIC(atomicExch, v)
PARED_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef PARED_ATOMIC
template <class T>
PARED_UNSEEN T atomicCAS(T* at, std::common_type_t<T> compare, std::common_type_t<T> v, PARED_HERE) {
  pared::cuda::emulate::touch(at, sizeof(T), pared::cuda::emulate::Touch::atomic, PARED_WHERE);
  const T old = *at;
  if (old == compare) *at = v;
  return old;
}

// ---- loads and stores with a cache hint

#define PARED_LOAD(name)                                  \
  template <class T>                                      \
  T name(const T* p, PARED_HERE) {                        \
    return pared::cuda::emulate::aligned(p, PARED_WHERE); \
  }
PARED_LOAD(__ldg)
PARED_LOAD(__ldca)
PARED_LOAD(__ldcg)
PARED_LOAD(__ldcs)
PARED_LOAD(__ldcv)
PARED_LOAD(__ldlu)
#undef PARED_LOAD
#define PARED_STORE(name)                                \
  template <class T>                                     \
  void name(T* p, std::common_type_t<T> v, PARED_HERE) { \
    pared::cuda::emulate::aligned(p, PARED_WHERE);       \
    *p = v;                                              \
  }
PARED_STORE(__stcs)
PARED_STORE(__stcg)
PARED_STORE(__stwb)
PARED_STORE(__stwt)
#undef PARED_STORE

// ---- arithmetic

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
  return r;
}
// The n-th set bit at or above `base`, counted from 1; n > 0 alone.
inline unsigned __fns(unsigned mask, unsigned base, int n) {
  for (unsigned i = base; i < 32; ++i)
    if (mask >> i & 1 && --n == 0) return i;
  return 0xffffffffu;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) {
  return static_cast<unsigned>(((uint64_t{hi} << 32 | lo) << (s & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) {
  return static_cast<unsigned>((uint64_t{hi} << 32 | lo) >> (s & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned sel = s >> (4 * i) & 15;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (sel & 7))) & 0xff;
    if (sel & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * i);
  }
  return r;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 0xff) * (b >> (8 * i) & 0xff);
  return c;
}
inline unsigned __dp2a_lo(unsigned a, unsigned b, unsigned c) {
  return c + (a & 0xffff) * (b & 0xff) + (a >> 16) * (b >> 8 & 0xff);
}
inline unsigned __dp2a_hi(unsigned a, unsigned b, unsigned c) { return __dp2a_lo(a, b >> 16, c); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
template <class To, class From>
To pared_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}
inline int __float_as_int(float v) { return pared_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return pared_bits<unsigned>(v); }
inline float __int_as_float(int v) { return pared_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return pared_bits<float>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float a) { return std::exp(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline int __float2int_rn(float a) {
  return a != a               ? 0
         : a >= 2147483648.0f ? INT32_MAX
         : a < -2147483648.0f ? INT32_MIN
                              : static_cast<int>(std::nearbyint(a));
}
inline float __int2float_rn(int a) { return static_cast<float>(a); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// Of pairs of 16-bit numbers, for the headers of their types.
#define PARED_PAIRS(pair, one)                                                                            \
  inline pair __habs2(pair v) { return pared_bits<pair>(pared_bits<uint32_t>(v) & 0x7fff7fffu); }         \
  inline unsigned __hge2_mask(pair a, pair b) {                                                           \
    return (float(a.x) >= float(b.x) ? 0xffffu : 0) | (float(a.y) >= float(b.y) ? 0xffff0000u : 0);       \
  }                                                                                                       \
  inline pair __hmax2_nan(pair a, pair b) {                                                               \
    const auto larger = [](one c, one d) { return float(c) != float(c) || float(c) > float(d) ? c : d; }; \
    return {larger(a.x, b.x), larger(a.y, b.y)};                                                          \
  }                                                                                                       \
  inline bool __hbeq2(pair a, pair b) { return float(a.x) == float(b.x) && float(a.y) == float(b.y); }

// ---- the runtime's host side, as far as the launchers use it. There is one device, and everything is done
// at once.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
};
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  int numRegs, maxThreadsPerBlock;
};
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorUnknown";
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated runtime"; }
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {"emulated", 9, 0, 3};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    default:
      *value = 3;  // few multiprocessors: small grids, so that small tensors take several rounds of a
                   // persistent kernel
  }
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, F*) {
  *a = {32, 1024};
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads, size_t) {
  *blocks = threads > 512 ? 1 : 2;
  return cudaSuccess;
}
