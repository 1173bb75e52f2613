#include "ops/machine_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "core/aligned.h"
#include "core/check.h"
#include "core/huge_pages.h"
#include "kernels/registry.h"

namespace pared {
namespace {

constexpr int64_t kStepFloats = 128;  // eight AVX-512 vectors: a whole number of steps at every width

}  // namespace

MachineProbeResult run_machine_probe(MachineProbe probe, int64_t bytes, int64_t repeats, int threads,
                                     bool huge_pages) {
  PARED_CHECK(bytes >= 1 && bytes <= (int64_t{1} << 40), "bytes: expected 1 to 2^40, got ", bytes);
  PARED_CHECK(repeats >= 1, "repeats: expected at least 1, got ", repeats);
  PARED_CHECK(threads >= 1 && threads <= 1024, "threads: expected 1 to 1024, got ", threads);
  const auto run = kernel_for<machine_probe>(active_isa()).fn;
  const int64_t floats = round_up(static_cast<size_t>(bytes), kStepFloats * sizeof(float)) / sizeof(float);
  std::vector<std::unique_ptr<float, decltype(&std::free)>> memory;
  std::vector<float> done(threads);
  for (int t = 0; t < threads; ++t) {
    const size_t size = floats * sizeof(float);
    void* data = huge_pages ? allocate_in_huge_pages(size) : std::aligned_alloc(kCacheLine, size);
    if (!data) throw std::bad_alloc();
    memory.emplace_back(static_cast<float*>(data), &std::free);
    std::fill_n(memory[t].get(), floats, 1.0f);
  }
  const auto work = [&](int t, int64_t times) { run({probe, memory[t].get(), floats, times, &done[t]}); };
  using Clock = std::chrono::steady_clock;
  std::vector<Clock::time_point> begin(threads), end(threads);
  std::atomic<int> ready{0};
  const auto timed = [&](int t) {
    work(t, 1);  // its pages and caches
    ++ready;
    while (ready.load() < threads) std::this_thread::yield();
    begin[t] = Clock::now();
    work(t, repeats);
    end[t] = Clock::now();
  };
  // Threads of its own: they are to run at the same time, which a pool does not promise.
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(timed, t);
  timed(0);
  for (std::thread& t : others) t.join();
  const auto first = *std::min_element(begin.begin(), begin.end());
  const auto last = *std::max_element(end.begin(), end.end());
  return {std::chrono::duration<double>(last - first).count(),
          static_cast<double>(floats) * static_cast<double>(repeats) * threads,
          *std::min_element(done.begin(), done.end())};
}

ClockProbeResult run_clock_probe(int64_t steps) {
  PARED_CHECK(steps >= 1, "steps: expected at least 1, got ", steps);
  uint64_t sum = 0, one = 1;
  const auto begin = std::chrono::steady_clock::now();
#pragma GCC unroll 8
  for (int64_t i = 0; i < steps; ++i) {
    sum += one;
    // Each sum is needed by the next. Not a constant: some processors add those without taking a cycle.
    __asm__ volatile("" : "+r"(sum), "+r"(one));
  }
  const auto end = std::chrono::steady_clock::now();
  return {std::chrono::duration<double>(end - begin).count(), sum};
}

}  // namespace pared
