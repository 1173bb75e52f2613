// Denormals as IEEE 754 has them, whatever mode the calling thread is in.
#pragma once

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
#else
  IeeeDenormals() = default;
#endif
  IeeeDenormals(const IeeeDenormals&) = delete;
  IeeeDenormals& operator=(const IeeeDenormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#endif
};

}  // namespace pared
