// Stress for core/parallel.cc on the std::thread pool. tests/test_parallel.py compiles it with the thread
// sanitizer and without, and with -DPLANTED_RACE to see the sanitizer find what it is there to find.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/backoff.h"
#include "core/parallel.h"

using pared::parallel_for;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// Every index exactly once, ranges no shorter than the grain. Plain ints: a range that two threads run is a
// race, and a write that the caller cannot see is one too.
void covers(int64_t begin, int64_t end, int64_t grain) {
  std::vector<int> hits(end - begin, 0);
  parallel_for(begin, end, grain, [&](int64_t b, int64_t e) {
    EXPECT(begin <= b && b < e && e <= end);
    EXPECT(e - b >= grain || e == end);
    for (int64_t i = b; i < e; ++i) ++hits[i - begin];
  });
  for (int h : hits) EXPECT(h == 1);
}

void sizes() {
  for (int64_t n : {0, 1, 2, 3, 7, 8, 9, 31, 100, 1009})
    for (int64_t grain : {0, 1, 2, 8, 64, 5000}) covers(-3, n - 3, grain);
}

// Loops so short that workers wake when they are over, each with its own variables: a worker that ran a stale
// loop would touch a dead frame.
void short_loops() {
  for (int i = 0; i < 20000; ++i) {
    int a[4] = {0, 0, 0, 0};
    parallel_for(0, 4, 1, [&](int64_t b, int64_t e) {
      for (int64_t j = b; j < e; ++j) a[j] = i;
    });
    for (int v : a) EXPECT(v == i);
  }
}

void nesting() {
  std::atomic<int64_t> total{0};
  parallel_for(0, 64, 1, [&](int64_t b, int64_t e) {
    EXPECT(pared::num_threads() == 1);
    const auto self = std::this_thread::get_id();
    parallel_for(0, 100, 1, [&](int64_t b2, int64_t e2) {
      EXPECT(std::this_thread::get_id() == self);
      total += (e - b) * (e2 - b2);
    });
  });
  EXPECT(total == 6400);
}

void exceptions() {
  for (int64_t bad : {0, 50, 99}) {
    bool caught = false;
    try {
      parallel_for(0, 100, 1, [&](int64_t b, int64_t e) {
        if (b <= bad && bad < e) throw std::runtime_error("planted");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    EXPECT(caught);
    EXPECT(pared::num_threads() > 1);  // no thread believes that it is still inside
    covers(0, 100, 1);
  }
}

void many_callers() {
  std::vector<std::thread> callers;
  for (int t = 0; t < 6; ++t)
    callers.emplace_back([] {
      for (int i = 0; i < 200; ++i) covers(0, 500, 1 + i % 7);
    });
  for (auto& t : callers) t.join();
}

// The rules, without a clock: nanoseconds go in.
void backoff_rules() {
  constexpr int64_t ms = 1'000'000;
  pared::Backoff b;
  b.shared(10 * ms, 40 * ms);  // unequal shares
  b.shared(0, ms / 5);         // a thread that wakes up
  EXPECT(!b.alone() && b.owed() == 0);
  b.shared(ms, 14 * ms + ms / 5);
  EXPECT(b.alone() && b.owed() == 10 * ms);
  b.alone(8 * ms, 4);  // four threads would have saved 6
  EXPECT(b.owed() == 4 * ms);
  b.alone(8 * ms, 4);
  EXPECT(!b.alone() && b.owed() == 0);
  // Losses that follow count twice, and none more than half a second.
  for (int i = 0; i < 3; ++i) {
    b.shared(0, ms + ms / 5);
    EXPECT(b.owed() == 2 * ms);
    b.alone(4 * ms, 2);
    b.shared(ms, ms);
    EXPECT(!b.alone());
  }
  b.shared(0, 400 * ms);
  EXPECT(b.owed() == 500 * ms);
  b.alone(1000 * ms, 2);
  // After 20 ms without one they count once again.
  for (int i = 0; i < 20; ++i) b.shared(ms, ms);
  b.shared(0, ms + ms / 5);
  EXPECT(b.owed() == ms);
  b.set(false);
  EXPECT(!b.alone());
  b.shared(0, 100 * ms);
  EXPECT(!b.alone());
  b.set(true);
  b.shared(0, ms + ms / 5);
  EXPECT(b.owed() == ms);
}

// A loop whose other threads come late to their end: asleep, as one that the system does not run. Whether
// another thread came.
bool shared_loop() {
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> came{false};
  int64_t ranges = 0;
  parallel_for(0, 4, 1, [&](int64_t, int64_t) {
    if (std::this_thread::get_id() != caller) {
      came = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      return;
    }
    ++ranges;
    // Not before there is somebody to wait for; alone there is one range.
    for (int i = 0; i < 20 && !came; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  EXPECT(came || ranges >= 1);
  return came;
}

void backing_off() {
  pared::set_parallel_backoff(true);
  while (!shared_loop()) {
  }
  EXPECT(pared::parallel_owed() > 0.01);
  // Alone, until sharing would have saved as much: three quarters of 20 ms each time.
  int loops = 0;
  for (; pared::parallel_owed() > 0; ++loops) {
    EXPECT(loops < 100);
    EXPECT(!shared_loop());
  }
  EXPECT(loops >= 1);
  while (!shared_loop()) {
  }
  EXPECT(pared::parallel_owed() > 0.01);
  // So it is where the caller is the one that does not run.
  pared::set_parallel_backoff(false);
  pared::set_parallel_backoff(true);
  const auto caller = std::this_thread::get_id();
  std::atomic<bool> begun{false};
  parallel_for(0, 4, 1, [&](int64_t, int64_t) {
    if (std::this_thread::get_id() != caller) {
      while (!begun) std::this_thread::yield();  // or there would be nothing left for it
      return;
    }
    begun = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  });
  EXPECT(pared::parallel_owed() > 0.01);
  pared::set_parallel_backoff(false);
  EXPECT(pared::parallel_owed() == 0);
  while (!shared_loop()) {
  }
  EXPECT(pared::parallel_owed() == 0);
}

#ifdef PLANTED_RACE
// Two threads write when both are here: on a busy machine one alone may do all ranges, which is no race. They
// wait for each other in relaxed order, which orders nothing else.
int planted() {
  int64_t sum = 0;
  for (int i = 0; i < 20; ++i) {  // the sanitizer may miss two writes at the very same moment
    std::atomic<int> here{0};
    parallel_for(0, 4, 1, [&](int64_t b, int64_t e) {
      here.fetch_add(1, std::memory_order_relaxed);
      while (here.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
      for (int64_t j = b; j < e; ++j) sum += j;
    });
  }
  std::printf("%lld\n", static_cast<long long>(sum));
  return 0;
}
#endif

int main() {
#ifdef PLANTED_RACE
  pared::set_parallel_backoff(false);
  return planted();
#endif
  EXPECT(pared::num_threads() == 4);
  backoff_rules();
  backing_off();
  pared::set_parallel_backoff(false);  // what follows is about loops that are shared
  sizes();
  short_loops();
  nesting();
  exceptions();
  many_callers();
  std::puts("ok");
}
