// With -fsanitize=thread the compiler puts a call in front of every access to memory. These are the functions
// that it calls, in place of that sanitizer's own: they tell the emulator of accesses to shared memory. For
// builds with PARED_ACCESSES, whose kernels are compiled so and without optimisation: an access in the source
// is then one here.
#include "cuda/emulate/simt.h"

using pared::cuda::emulate::called;
using pared::cuda::emulate::returned;
using pared::cuda::emulate::Touch;
using pared::cuda::emulate::touched;

#define PARED_HOOK extern "C" __attribute__((visibility("default")))
#define PARED_ACCESS(bytes)                                       \
  PARED_HOOK void __tsan_read##bytes(void* p) {                   \
    touched(p, bytes, Touch::read, __builtin_return_address(0));  \
  }                                                               \
  PARED_HOOK void __tsan_write##bytes(void* p) {                  \
    touched(p, bytes, Touch::write, __builtin_return_address(0)); \
  }                                                               \
  PARED_HOOK void __tsan_unaligned_read##bytes(void* p) {         \
    touched(p, bytes, Touch::read, __builtin_return_address(0));  \
  }                                                               \
  PARED_HOOK void __tsan_unaligned_write##bytes(void* p) {        \
    touched(p, bytes, Touch::write, __builtin_return_address(0)); \
  }
PARED_ACCESS(1)
PARED_ACCESS(2)
PARED_ACCESS(4)
PARED_ACCESS(8)
PARED_ACCESS(16)
#undef PARED_ACCESS
PARED_HOOK void __tsan_read_range(void* p, unsigned long bytes) {
  touched(p, bytes, Touch::read, __builtin_return_address(0));
}
PARED_HOOK void __tsan_write_range(void* p, unsigned long bytes) {
  touched(p, bytes, Touch::write, __builtin_return_address(0));
}
PARED_HOOK void __tsan_func_entry(void* caller) { called(caller); }
PARED_HOOK void __tsan_func_exit(void*) { returned(); }
PARED_HOOK void __tsan_init() {}
PARED_HOOK void __tsan_vptr_update(void**, void*) {}
PARED_HOOK void __tsan_vptr_read(void**) {}
// Of the host's code, and of the guards of function-local statics.
PARED_HOOK char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
PARED_HOOK int __tsan_atomic32_load(const volatile int* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
PARED_HOOK void __tsan_atomic32_store(volatile int* p, int v, int) {
  __atomic_store_n(p, v, __ATOMIC_SEQ_CST);
}
PARED_HOOK long __tsan_atomic64_fetch_add(volatile long* p, long v, int) {
  return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
#undef PARED_HOOK
