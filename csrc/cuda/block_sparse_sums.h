// What becomes of the sums of a block-sparse product: those of a row in parts are added, then outputs are
// made of them.
#pragma once

#include "cuda/block_sparse.h"
#include "cuda/epilogue.h"
#include "cuda/mma_tile.h"
#include "cuda/ptx.h"
#include "cuda/ticket.h"

namespace pared::cuda {

// Where an item is a part of a row: true for the last to finish, which then has the sums of all parts.
template <class T, class Sum>
__device__ bool reduce_parts(const BlockSparseProduct& p, const BlockItem& item, int64_t counter_bytes,
                             Ticket launch, Sum (&sums)[T::kMmaM][T::kMmaN][4]) {
  constexpr int64_t kCount = int64_t{T::kRows} * T::kColumns;
  const int64_t tile = blockIdx.y, tiles = gridDim.y;
  auto* counter = reinterpret_cast<Ticket*>(p.workspace) + item.slot * tiles + tile;
  const Ticket seen = threadIdx.x == 0 ? __ldcg(counter) : 0;
  auto* parts = reinterpret_cast<Sum*>(p.workspace + counter_bytes) + threadIdx.x;
  const auto part_at = [&](int part) { return parts + ((item.slot + part) * tiles + tile) * kCount; };
  Sum* out = part_at(item.part);
#pragma unroll
  for (int m = 0; m < T::kMmaM; ++m)
#pragma unroll
    for (int n = 0; n < T::kMmaN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) __stcg(out + ((m * T::kMmaN + n) * 4 + i) * T::kThreads, sums[m][n][i]);
  if (!last_of(counter, seen, launch, static_cast<uint32_t>(item.parts), [] { T::sync(); })) return false;
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
    const auto sums = *reinterpret_cast<const Four<Sum>*>(staged + r * T::kSumStride + c);
    Four<Y> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.at[i] = narrow<Y>(i < count ? finish(p, sums.at[i], m, n + i) : 0.0f);
    store_first(static_cast<Y*>(p.y) + m * p.y_stride + n, out, count);
  }
}

// The sums of a tile, which each thread has in the places of an mma, to y. `shared` takes them on the way:
// what is there has been read, and is overwritten.
template <class T, class Sum>
__device__ __forceinline__ void finish_tile(const BlockSparseProduct& p, const BlockItem& item,
                                            int64_t counter_bytes, Ticket launch, int64_t first_token,
                                            unsigned char* shared, Sum (&sums)[T::kMmaM][T::kMmaN][4]) {
  if (item.parts > 1 && !reduce_parts<T>(p, item, counter_bytes, launch, sums)) return;
  T::sync();  // the stages are read: their memory takes the sums
  auto* staged = reinterpret_cast<Sum*>(shared);
  stage_sums<T>(staged, sums);
  T::sync();
  const int64_t first_output = int64_t{item.row} * T::kColumns;
  switch (p.dtype) {
    case DType::f32: return store_tile<T, float>(p, staged, first_token, first_output);
    case DType::f16: return store_tile<T, __half>(p, staged, first_token, first_output);
    default: return store_tile<T, __nv_bfloat16>(p, staged, first_token, first_output);
  }
}

}  // namespace pared::cuda
