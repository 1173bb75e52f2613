// CUDA's half type for the emulator, in place of the toolkit's header of this name: storage and conversions,
// and arithmetic that rounds once.
#pragma once

#include "cuda_runtime.h"

namespace pared::cuda::emulate {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ffu;
  if (exponent == 31) return pared_bits<float>(sign | 0x7f800000u | mantissa << 13);
  const float magnitude =
      exponent ? std::ldexp(static_cast<float>(mantissa | 0x400u), static_cast<int>(exponent) - 25)
               : std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -magnitude : magnitude;
}
inline uint16_t float_to_half(float f) {
  const uint32_t bits = pared_bits<uint32_t>(f);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = std::fabs(f);
  if (f != f) return static_cast<uint16_t>(0x7fff);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 6.103515625e-05f)  // subnormal: a multiple of 2^-24, ties to even
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))));
  const uint32_t m = bits & 0x7fffffffu, rounded = m + 0xfffu + (m >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

}  // namespace pared::cuda::emulate

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float f) : bits(pared::cuda::emulate::float_to_half(f)) {}
  operator float() const { return pared::cuda::emulate::half_to_float(bits); }
};
using half = __half;
struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline float __half2float(__half h) { return h; }
inline __half __float2half(float f) { return {f}; }
inline __half __float2half_rn(float f) { return {f}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return pared_bits<__half>(bits); }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half2 __float22half2_rn(float2 f) { return {f.x, f.y}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {a.x - b.x, a.y - b.y}; }
inline float __low2float(__half2 h) { return h.x; }
inline float __high2float(__half2 h) { return h.y; }
PARED_PAIRS(__half2, __half)
