// Tiles of products on mma.sync whose operands come in stages of 128 bytes of the reduction: swizzled shared
// memory, filled by cp.async and read by ldmatrix without bank conflicts, and sums in registers. The same for
// 16-bit and 8-bit values: a fragment is as many bytes.
#pragma once

#include "cuda/ptx.h"

namespace pared::cuda {

inline constexpr int kStepBytes = 128;  // of the reduction, a stage
inline constexpr int kChunk = 16, kChunks = kStepBytes / kChunk;
inline constexpr int kMmaBytes = 32;  // of the reduction, an mma

// kRows by kColumns sums of a block of threads, kWarpsM by kWarpsN warps.
template <int kRows_, int kColumns_, int kStages_, int kWarpsM_, int kWarpsN_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpColumns = kColumns / kWarpsN;
  static constexpr int kMmaM = kWarpRows / 16, kMmaN = kWarpColumns / 8;
  static constexpr int kStageBytes = (kRows + kColumns) * kStepBytes;
  static constexpr int kSumStride = kColumns + 8;  // of the sums in shared memory: rows 8 banks apart
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr size_t kShared = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0);

  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsM * kWarpRows;
  }
  static __device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsM * kWarpColumns;
  }
  // Of sums[m][n] of this warp: the first of their 16 rows and 8 columns.
  static __device__ __forceinline__ int sum_row(int m) { return warp_row() + m * 16; }
  static __device__ __forceinline__ int sum_column(int n) { return warp_column() + n * 8; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }  // of the threads that have sums
};

struct MmaS8 {
  using Sum = int32_t;
  static __device__ __forceinline__ void mma(int32_t (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    ptx::mma_s8(c, a, b);
  }
};
struct MmaF16 {
  using Sum = float;
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_f16(c, a, b);
  }
};
struct MmaBf16 {
  using Sum = float;
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_bf16(c, a, b);
  }
};

// Where a row's chunk lies in a stage: eight rows of one chunk touch all 32 banks.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * kStepBytes + ((chunk ^ (row & 7)) * kChunk);
}

// Adds the product of a stage: rows of A, then rows of B, kStepBytes each.
template <class T, class Mma>
__device__ __forceinline__ void multiply_stage(typename Mma::Sum (&sums)[T::kMmaM][T::kMmaN][4],
                                               const unsigned char* stage) {
  const unsigned char* a = stage;
  const unsigned char* b = stage + T::kRows * kStepBytes;
  const int lane = ptx::lane(), warp_row = T::warp_row(), warp_column = T::warp_column();
#pragma unroll
  for (int k = 0; k < kStepBytes / kMmaBytes; ++k) {
    uint32_t fa[T::kMmaM][4], fb[T::kMmaN][2];
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m)
      ptx::load_matrices(fa[m], a + chunk_at(warp_row + m * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < T::kMmaN; n += 2) {
      uint32_t two[4];
      ptx::load_matrices(two,
                         b + chunk_at(warp_column + n * 8 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      fb[n][0] = two[0];
      fb[n][1] = two[1];
      fb[n + 1][0] = two[2];
      fb[n + 1][1] = two[3];
    }
#pragma unroll
    for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
      for (int n = 0; n < T::kMmaN; ++n) Mma::mma(sums[m][n], fa[m], fb[n]);
  }
}

// The sums to shared memory, rows kSumStride apart, for an epilogue in which a thread has consecutive
// columns. Barriers before and after it are the caller's.
template <class T, class Sum>
__device__ __forceinline__ void stage_sums(Sum* staged, const Sum (&sums)[T::kMmaM][T::kMmaN][4]) {
  struct alignas(8) Two {
    Sum at[2];
  };
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
#pragma unroll
  for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < T::kMmaN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Two two{{sums[m][n][2 * half], sums[m][n][2 * half + 1]}};
        *reinterpret_cast<Two*>(staged + (T::sum_row(m) + half * 8 + g) * T::kSumStride + T::sum_column(n) +
                                2 * t) = two;
      }
}

}  // namespace pared::cuda
