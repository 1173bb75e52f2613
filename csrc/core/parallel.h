// Parallel loops on the pool that the process already has.
//
// When torch (2.10 or newer) is loaded, loops run on torch's own pool with torch's thread count: a second
// pool beside a spinning torch worker costs more than the loop saves. Otherwise a small pool of std::threads
// serves.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>
#include <vector>

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
//
// Where threads had to be waited for because other processes kept them from running, loops run serially until
// that has been made up for.
void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn);

// Whether parallel_for may do so (it may at first), and the seconds it has still to make up for.
void set_parallel_backoff(bool on);
double parallel_owed();

// The items that one part of a parallel_items call takes, one by one.
class Items {
 public:
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  Items(std::vector<Stretch>& stretches, int64_t part) : stretches_(stretches), part_(part) {}
  // The next item, or -1 when none is left: those of its own stretch in order, then what others have left.
  int64_t next() {
    const auto parts = static_cast<int64_t>(stretches_.size());
    for (; helped_ < parts; ++helped_) {
      Stretch& s = stretches_[(part_ + helped_) % parts];
      const int64_t i = s.next.fetch_add(1, std::memory_order_relaxed);
      if (i < s.end) return i;
    }
    return -1;
  }

 private:
  std::vector<Stretch>& stretches_;
  int64_t part_, helped_ = 0;
};

// Calls fn(part, items) for each of `parts` parts, which between them take each of `count` items once: for
// work that one thread must not wait for, because another was late to wake or does something else.
template <class F>
void parallel_items(int64_t count, int64_t parts, const F& fn) {
  std::vector<Items::Stretch> stretches(parts);
  for (int64_t p = 0; p < parts; ++p) {
    stretches[p].next = count * p / parts;
    stretches[p].end = count * (p + 1) / parts;
  }
  parallel_for(0, parts, 1, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) fn(p, Items(stretches, p));
  });
}

// "torch" or "std::thread": who runs the loops now, for reports and tests.
const char* parallel_backend();

}  // namespace pared
