// float32 vectors, one type for each level: the vocabulary that the generic kernels are written in. A
// translation unit gets the widest type its flags allow, plus the scalar one. Everything is in an unnamed
// namespace: the same name means other instructions in another translation unit.
#pragma once

#include <math.h>
#include <stdint.h>

#include "core/dtype.h"
#include "kernels/generic/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pared {
namespace {

#define PARED_INLINE inline __attribute__((always_inline))

struct ScalarF32 {
  static constexpr int width = 1;
  using V = float;
  static PARED_INLINE V zero() { return 0.0f; }
  static PARED_INLINE V set1(float f) { return f; }
  static PARED_INLINE V load(const float* p) { return *p; }
  static PARED_INLINE V loadu(const float* p) { return *p; }
  static PARED_INLINE void store(float* p, V v) { *p = v; }
  static PARED_INLINE void storeu(float* p, V v) { *p = v; }
  static PARED_INLINE V add(V a, V b) { return a + b; }
  // Rounded twice, as portable C++ is without a fused instruction.
  static PARED_INLINE V fma(V a, V b, V c) { return a * b + c; }
};

#if defined(__AVX2__)
struct Avx2F32 {
  static constexpr int width = 8;
  using V = __m256;
  static PARED_INLINE V zero() { return _mm256_setzero_ps(); }
  static PARED_INLINE V set1(float f) { return _mm256_set1_ps(f); }
  static PARED_INLINE V load(const float* p) { return _mm256_load_ps(p); }
  static PARED_INLINE V loadu(const float* p) { return _mm256_loadu_ps(p); }
  static PARED_INLINE void store(float* p, V v) { _mm256_store_ps(p, v); }
  static PARED_INLINE void storeu(float* p, V v) { _mm256_storeu_ps(p, v); }
  static PARED_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  static PARED_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
};
#endif

#if defined(__AVX512F__)
struct Avx512F32 {
  static constexpr int width = 16;
  using V = __m512;
  static PARED_INLINE V zero() { return _mm512_setzero_ps(); }
  static PARED_INLINE V set1(float f) { return _mm512_set1_ps(f); }
  static PARED_INLINE V load(const float* p) { return _mm512_load_ps(p); }
  static PARED_INLINE V loadu(const float* p) { return _mm512_loadu_ps(p); }
  static PARED_INLINE void store(float* p, V v) { _mm512_store_ps(p, v); }
  static PARED_INLINE void storeu(float* p, V v) { _mm512_storeu_ps(p, v); }
  static PARED_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static PARED_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
};
#endif

}  // namespace
}  // namespace pared
