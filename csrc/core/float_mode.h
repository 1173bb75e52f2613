// Denormals as IEEE 754 has them, whatever mode the calling thread is in.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace pared {

// torch.set_flush_denormal changes the calling thread alone, so that without this the same product would have
// other bits on another thread.
class IeeeDenormals {
 public:
#if defined(__x86_64__)
  IeeeDenormals() : saved_(_mm_getcsr()) {
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    _mm_setcsr(saved_ & ~(kFlushToZero | kDenormalsAreZero));
  }
  ~IeeeDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  IeeeDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    constexpr uint64_t kFlushToZero = 1u << 24;  // and denormals are zero
    set(saved_ & ~kFlushToZero);
  }
  ~IeeeDenormals() { set(saved_); }
#else
  IeeeDenormals() = default;
#endif
  IeeeDenormals(const IeeeDenormals&) = delete;
  IeeeDenormals& operator=(const IeeeDenormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#elif defined(__aarch64__)
  static void set(uint64_t fpcr) { __asm__ volatile("msr fpcr, %0" ::"r"(fpcr)); }
  uint64_t saved_;
#endif
};

}  // namespace pared
