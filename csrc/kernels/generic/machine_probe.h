// Loops that do one thing as fast as the machine can: the ceilings that benchmarks compare kernels with. Each
// leaves a result that says how much work it did, so that a test can tell that the compiler left it whole.
#pragma once

#include "kernels/generic/gemm_u8s8.h"
#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// Vectors a step. Independent accumulators: two multiply-adds a cycle with a latency of four need eight.
constexpr int kProbeVectors = 8;

template <class S>
PARED_INLINE float first_lane(typename S::V v) {
  alignas(64) float lanes[S::width];
  S::store(lanes, v);
  return lanes[0];
}

// The same value, for all that the compiler knows another one.
template <class T>
PARED_INLINE void renew(const T*& p) {
  __asm__ volatile("" : "+r"(p) : : "memory");
}
#if defined(__AVX2__)
PARED_INLINE void renew(__m256i& v) { __asm__ volatile("" : "+x"(v)); }
#endif
#if defined(__AVX512F__)
PARED_INLINE void renew(__m512i& v) { __asm__ volatile("" : "+v"(v)); }
#endif

#if defined(__aarch64__)
PARED_INLINE void renew(uint8x8_t& v) { __asm__ volatile("" : "+w"(v)); }
PARED_INLINE void renew(uint8x16_t& v) { __asm__ volatile("" : "+w"(v)); }
#endif

// Byte products in registers, `all` times 64; ones in the first byte of each unit are counted.
template <class D>
float count_dots(int64_t all) {
  alignas(64) int8_t w[kInt8Panel * kInt8Unit] = {};
  const uint8_t x[kInt8Unit] = {1, 0, 0, 0};
  for (int j = 0; j < kInt8Panel; ++j) w[j * kInt8Unit] = 1;
  const int8_t* known = w;
  renew(known);  // the compiler is not to see that its vectors are equal
  const typename D::W weights = D::weights(known);
  typename D::A unit = D::unit(x);
  // As many sums as the level's tile has, eight at most: others would go through memory.
  constexpr int kTile = D::tokens * D::panels, kSums = kTile < 8 ? kTile : 8;
  typename D::Acc dots[kSums];
#pragma GCC unroll 8
  for (int v = 0; v < kSums; ++v) dots[v] = D::zero();
  int64_t left = all;
  for (; left >= kSums; left -= kSums)
#pragma GCC unroll 8
    for (int v = 0; v < kSums; ++v) {
      renew(unit);  // or products that are not fused with their sum would be computed once for all
      D::dot(dots[v], unit, weights);
    }
  int64_t counted = 0;
  alignas(64) int32_t sums[kInt8Panel];
#pragma GCC unroll 8
  for (int v = 0; v < kSums; ++v) {
    if (v < left) D::dot(dots[v], unit, weights);
    D::store(sums, dots[v], false);
    for (const int32_t sum : sums) counted += sum;  // all of them, or some would not be computed
  }
  return static_cast<float>(counted) / kInt8Panel;
}

// S: the level's float32 vectors, D: its int8 dot product.
template <class S, class D>
void run_probe(const MachineProbeArgs& a) {
  using V = typename S::V;
  constexpr int N = kProbeVectors, step = N * S::width;
  V sum[N];
  for (int v = 0; v < N; ++v) sum[v] = S::zero();
  switch (a.probe) {
    case MachineProbe::fma: {
      const V one = S::loadu(a.data);
      for (int64_t r = 0; r < a.repeats; ++r)
        for (int64_t i = 0; i < a.floats; i += step)
#pragma GCC unroll 8
          for (int v = 0; v < N; ++v) sum[v] = S::fma(one, one, sum[v]);
      break;
    }
    case MachineProbe::load:
      for (int64_t r = 0; r < a.repeats; ++r)
        for (int64_t i = 0; i < a.floats; i += step)
#pragma GCC unroll 8
          for (int v = 0; v < N; ++v) sum[v] = S::add(sum[v], S::load(a.data + i + v * S::width));
      break;
    case MachineProbe::store: {
      const V one = S::set1(1.0f);
      for (int64_t r = 0; r < a.repeats; ++r) {
        for (int64_t i = 0; i < a.floats; i += step)
#pragma GCC unroll 8
          for (int v = 0; v < N; ++v) S::store(a.data + i + v * S::width, one);
        // Or the compiler would keep the last of the identical passes alone.
        __asm__ volatile("" : : "r"(a.data) : "memory");
      }
      sum[0] = S::set1(static_cast<float>(a.repeats) * static_cast<float>(a.floats / step));
      break;
    }
    case MachineProbe::panel:
      // As in the sparse kernel: a value broadcast, then multiply-adds with a memory operand.
      for (int64_t r = 0; r < a.repeats; ++r)
        for (int64_t i = 0; i < a.floats; i += step) {
          const V w = S::set1(a.data[i / step]);
#pragma GCC unroll 8
          for (int v = 0; v < N; ++v) sum[v] = S::fma(w, S::load(a.data + i + v * S::width), sum[v]);
        }
      break;
    case MachineProbe::dot8: {
      // Every "vector" is 64 byte products.
      *a.done = count_dots<D>(a.repeats * ((a.floats + step - 1) / step) * kProbeVectors) / kProbeVectors;
      return;
    }
  }
  float total = 0.0f;
  for (int v = 0; v < N; ++v) total += first_lane<S>(sum[v]);
  *a.done = a.probe == MachineProbe::store ? first_lane<S>(sum[0]) : total / N;
}

}  // namespace
}  // namespace pared
