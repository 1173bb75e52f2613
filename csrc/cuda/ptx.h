// Everything that CUDA C++ has no name for: the only file with inline PTX. emulate/ptx.h has the same
// functions for the emulator; what they do is said here, once.
//
// Shared memory is declared with the two macros below, so that the emulator can fill it with NaN patterns:
//   PARED_SHARED(float[32], sums);          // static: a type and a name
//   PARED_DYNAMIC_SHARED(bytes);            // dynamic: unsigned char*, aligned to 1024
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace pared::cuda {

template <class T>
struct SameType {
  using type = T;
};

// The same bits as another type.
template <class To, class From>
__device__ __forceinline__ To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace pared::cuda

#ifdef PARED_CUDA_EMULATED
#include "cuda/emulate/ptx.h"
#else

#include <cuda.h>  // for CUtensorMap

#define PARED_SHARED(type_, name) __shared__ typename ::pared::cuda::SameType<type_>::type name
#define PARED_DYNAMIC_SHARED(name)                                  \
  extern __shared__ __align__(1024) unsigned char pared_dynamic_[]; \
  unsigned char* const name = pared_dynamic_

namespace pared::cuda::ptx {

// The 32-bit address of a pointer into shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ int lane() {
  int l;
  asm("mov.u32 %0, %%laneid;" : "=r"(l));
  return l;
}

// Any function of three words, bit by bit, in one instruction: its table is what it makes of 0xf0, 0xcc,
// 0xaa.
template <int kTable>
__device__ __forceinline__ uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Four of the eight bytes of a and b (4 to 7), by the lowest four nibbles of `select`, each below 8.
// __byte_perm clears the nibbles' highest bits first, with an instruction more.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(select));
  return d;
}

// v, and in lanes from `distance` on also the v of the lane so far to the left.
__device__ __forceinline__ uint32_t add_from_left(uint32_t v, int distance) {
  uint32_t sum;
  asm volatile(
      "{\n.reg .pred p;\n.reg .u32 left;\nshfl.sync.up.b32 left|p, %1, %2, 0, 0xffffffff;\n"
      "mov.u32 %0, %1;\n@p add.u32 %0, %0, left;\n}"
      : "=&r"(sum)
      : "r"(v), "r"(distance));
  return sum;
}

// ---- global memory

// 16 bytes that nobody writes while the kernel runs, read once: not kept in L1.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// ---- shared memory, by its 32-bit address: sums of products of bytes make addresses without a 64-bit step

// T: of one, two or four bytes, as a word, or uint2 or uint4, as they are.
template <class T>
__device__ __forceinline__ auto load_shared(uint32_t address) {
  if constexpr (sizeof(T) == 16) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
  } else {
    uint32_t v;
    if constexpr (sizeof(T) == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    else if constexpr (sizeof(T) == 1)
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    else asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
  }
}

// The word there, and the address of the next one, where `some` is not zero; else zero, and the same address.
__device__ __forceinline__ uint32_t take_shared(uint32_t some, uint32_t& address) {
  uint32_t v;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n@p ld.shared.u32 %0, [%1];\n"
      "@p add.u32 %1, %1, 4;\n}"
      : "=&r"(v), "+r"(address)
      : "r"(some)
      : "memory");
  return v;
}

// Adds one to a word, atomically.
__device__ __forceinline__ void count_shared(uint32_t address) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}

// ---- cp.async (sm_80): a thread's own copies into shared memory, by groups

// Copies kBytes (4, 8 or 16), of which the first `valid` come from `global` and the rest become zero.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
}
// Closes the group of the copies since the last one; it may be empty.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kInFlight of the thread's groups are under way. Other threads' copies need a barrier
// after it.
template <int kInFlight>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// ---- mbarrier and bulk copies (sm_90)

// Whether this code has bulk copies: code for sm_80 can run on a later device that has them.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kBulkCopies = true;
#else
inline constexpr bool kBulkCopies = false;
#endif
// Before others use the barrier: fence_barrier_init by the initialising thread, then a block barrier.
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared::cta.b64 t, [%0];\n}" ::"r"(shared_address(bar))
               : "memory");
}
#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// Arrives, and lets the phase wait for `bytes` of bulk copies besides.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* bar, int bytes) {
  asm volatile(
      "{\n.reg .b64 t;\nmbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;\n}" ::"r"(shared_address(bar)),
      "r"(bytes)
      : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0 for the third, ...
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          shared_address(bar)),
      "r"(parity)
      : "memory");
}
// One thread copies `bytes` (a multiple of 16, both addresses too); the barrier's phase counts them as they
// arrive.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}
#endif

// ---- named barriers 1 to 15, for some warps of a block (`threads` of them, a multiple of 32)

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor cores. Lane l is (g, t) = (l / 4, l % 4).
//
// A [16 x 16] of 16-bit values, 2 a register: a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] =
// (g + 8, 2t + 8); B [16 x 8]:                                b[0] = (2t, g), b[1] = (2t + 8, g): two values
// down K; C [16 x 8]: c[0], c[1] = (g, 2t), (g, 2t + 1); c[2], c[3] = (g + 8, 2t), (g + 8, 2t + 1). int8: A
// [16 x 32], 4 a register: a[0] = (g, 4t), a[1] = (g + 8, 4t), a[2] = (g, 4t + 16), a[3] = (g + 8, 4t + 16);
//       B [32 x 8]: b[0] = (4t, g), b[1] = (4t + 16, g); C as above.

#define PARED_MMA(name, shape_types, type, constraint)                                                    \
  __device__ __forceinline__ void name(type(&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {     \
    asm volatile("mma.sync.aligned." shape_types                                                          \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
                 : "+" constraint(c[0]), "+" constraint(c[1]), "+" constraint(c[2]), "+" constraint(c[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }
PARED_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32", float, "f")
PARED_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32", float, "f")
PARED_MMA(mma_s8, "m16n8k32.row.col.s32.s8.s8.s32", int32_t, "r")
#undef PARED_MMA

// Four 8x8 matrices of 16-bit values: lane 8i + r points to row r of matrix i, 16 aligned bytes. Register i
// of lane (g, t) holds (g, 2t) and (g, 2t + 1) of matrix i; transposed: (2t, g) and (2t + 1, g). x2 reads the
// pointers of lanes 0 to 15.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- wgmma and tensor maps (sm_90a): matrices in shared memory as rows of 128 bytes, eight of them 1024
// aligned bytes, chunks of 16 swizzled by chunk ^= row % 8

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
// One thread copies a box of cuda/tensor_map.h, its first byte at (column, row) of the matrix; the barrier's
// phase counts all of its bytes, those beyond the matrix too, which become zero.
__device__ __forceinline__ void copy_tensor(void* shared, const CUtensorMap* map, int column, int row,
                                            uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(bar))
      : "memory");
}

// Before the first of several products, after registers or shared memory that they read were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of the products since the last one.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kInFlight groups are under way: before that sums must not be touched, nor what is
// multiplied be written.
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// A matrix whose row 0 begins at `rows`; 32 bytes further in it, inside the first 128, is the matrix's next
// part down the reduction.
__device__ __forceinline__ uint64_t wgmma_operand(const void* rows) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | (shared_address(rows) & 0x3ffff) >> 4;
}

// c += A B^T by the four warps of a warpgroup: A has 64 rows, B 8 kN rows, both 32 bytes of the reduction.
// Warp w, lane (g, t), has in c[n] what it would have of an mma: rows 16 w + g and 8 below, columns 8 n + 2 t
// and the next.
#define PARED_SUMS(i, constraint) \
  "+" constraint(c[i][0]), "+" constraint(c[i][1]), "+" constraint(c[i][2]), "+" constraint(c[i][3])
#define PARED_SUMS_8(i, k)                                                                                  \
  PARED_SUMS(i, k), PARED_SUMS(i + 1, k), PARED_SUMS(i + 2, k), PARED_SUMS(i + 3, k), PARED_SUMS(i + 4, k), \
      PARED_SUMS(i + 5, k), PARED_SUMS(i + 6, k), PARED_SUMS(i + 7, k)
#define PARED_WGMMA_64(name, types, depth, type, constraint, scales)                              \
  __device__ __forceinline__ void name(type(&c)[8][4], uint64_t a, uint64_t b) {                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64" depth types                                \
                 " {"                                                                             \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
                 "}, %32, %33, 1" scales ";"                                                      \
                 : PARED_SUMS_8(0, constraint)                                                    \
                 : "l"(a), "l"(b)                                                                 \
                 : "memory");                                                                     \
  }
#define PARED_WGMMA_128(name, types, depth, type, constraint, scales)                               \
  __device__ __forceinline__ void name(type(&c)[16][4], uint64_t a, uint64_t b) {                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128" depth types                                 \
                 " {"                                                                               \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
                 "}, %64, %65, 1" scales ";"                                                        \
                 : PARED_SUMS_8(0, constraint), PARED_SUMS_8(8, constraint)                         \
                 : "l"(a), "l"(b)                                                                   \
                 : "memory");                                                                       \
  }
#define PARED_WGMMA(name, types, depth, type, constraint, scales) \
  PARED_WGMMA_64(name, types, depth, type, constraint, scales)    \
  PARED_WGMMA_128(name, types, depth, type, constraint, scales)
PARED_WGMMA(wgmma_f16, ".f32.f16.f16", "k16", float, "f", ", 1, 1, 0, 0")
PARED_WGMMA(wgmma_bf16, ".f32.bf16.bf16", "k16", float, "f", ", 1, 1, 0, 0")
PARED_WGMMA(wgmma_s8, ".s32.s8.s8", "k32", int32_t, "r", "")
#undef PARED_WGMMA
#undef PARED_WGMMA_64
#undef PARED_WGMMA_128
#undef PARED_SUMS_8
#undef PARED_SUMS
#endif

}  // namespace pared::cuda::ptx

#endif
