// Parallel loops on the pool that the process already has.
//
// When torch (2.10 or newer) is loaded, loops run on torch's own pool with torch's thread count: a second
// pool beside a spinning torch worker costs more than the loop saves. Otherwise a small pool of std::threads
// serves.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pared {

// A non-owning reference to a callable void(int64_t begin, int64_t end).
class RangeFn {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, RangeFn>>>
  RangeFn(const F& f)  // NOLINT: implicit by design, it lives for one call
      : ctx_(const_cast<F*>(&f)),
        call_([](int64_t b, int64_t e, void* ctx) { (*static_cast<const F*>(ctx))(b, e); }) {}
  void operator()(int64_t b, int64_t e) const { call_(b, e, ctx_); }

 private:
  void* ctx_;
  void (*call_)(int64_t, int64_t, void*);
};

// How many threads a parallel_for from here would use: 1 inside one.
int num_threads();

// Threads of the pool for processes without torch: PARED_NUM_THREADS, else OMP_NUM_THREADS as torch takes it,
// else the processors that this process may run on. Throws ValueError when PARED_NUM_THREADS is no such
// number.
int own_threads();

// Calls fn on disjoint ranges that cover [begin, end), each of at least `grain` items (the last may be
// shorter). Runs serially when there is one thread, one grain of work, or when nested. When fn throws, the
// ranges not yet begun may be left out, and the first exception reaches the caller after the last range.
void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn);

// "torch" or "std::thread": who runs the loops now, for reports and tests.
const char* parallel_backend();

}  // namespace pared
