// Whether a parallel loop is worth its threads on a machine that others use too.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace pared {

// Whether loops are to run on the calling thread alone. Where other processes keep cores busy, a loop that is
// shared ends when the system has let each of its threads run, after milliseconds in which one thread would
// have done many short loops. The time lost so is owed, and loops run alone until what sharing them would
// have saved has paid it back, twice over where losses follow each other.
class Backoff {
 public:
  bool alone() const { return owed_.load(std::memory_order_relaxed) > 0; }

  // A shared loop, whose caller worked for `own` and which ended after `all`. Up to four times is put down to
  // unequal shares, and some time to waking up.
  void shared(int64_t own, int64_t all) {
    const int64_t lost = all - 4 * own - kWake;
    if (lost <= 0) {
      well_.fetch_add(own, std::memory_order_relaxed);
    } else if (on_.load(std::memory_order_relaxed)) {
      const bool again = well_.exchange(0, std::memory_order_relaxed) < kWell;
      owed_.store(std::min(again ? 2 * lost : lost, kMost), std::memory_order_relaxed);
    }
  }

  // A loop that ran alone, for `own`, where `threads` could have shared it.
  void alone(int64_t own, int64_t threads) {
    owed_.fetch_sub(own - own / threads, std::memory_order_relaxed);
  }

  // On, or off, with nothing owed.
  void set(bool on) {
    on_.store(on, std::memory_order_relaxed);
    owed_.store(0, std::memory_order_relaxed);
    well_.store(kWell, std::memory_order_relaxed);
  }

  int64_t owed() const { return std::max<int64_t>(0, owed_.load(std::memory_order_relaxed)); }

 private:
  static constexpr int64_t kWake = 200'000, kWell = 20'000'000, kMost = 500'000'000;  // ns
  // Threads that call at once may forget what another one has noted: these are estimates.
  std::atomic<int64_t> owed_{0}, well_{kWell};
  std::atomic<bool> on_{true};
};

}  // namespace pared
