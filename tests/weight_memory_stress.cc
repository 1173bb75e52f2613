// Stress for core/weight_memory.cc: threads whose weights come and go, while the process forks.
// tests/test_packing_memory.py compiles it, with the thread sanitizer and without.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "core/weight_memory.h"

namespace {

struct Weight {
  unsigned char* data;
  size_t bytes;
  unsigned char value;
};

// False where a weight holds what another one was filled with.
bool come_and_go(unsigned seed, int times) {
  std::mt19937 random(seed);
  std::vector<Weight> held;
  for (int i = 0; i < times || !held.empty(); ++i) {
    if (!held.empty() && (i >= times || held.size() > 12 || random() % 2)) {
      std::swap(held[random() % held.size()], held.back());
      const Weight w = held.back();
      held.pop_back();
      if (w.data[0] != w.value || std::memcmp(w.data, w.data + 1, w.bytes - 1) != 0) return false;
      pared::free_weight(w.data);
    } else {
      const size_t bytes = pared::kSmallestWeight / 2 + random() % (4 * pared::kSmallestWeight);
      auto* data = static_cast<unsigned char*>(pared::allocate_weight(bytes));
      if (!data || reinterpret_cast<uintptr_t>(data) % 64 != 0) return false;
      held.push_back({data, bytes, static_cast<unsigned char>(random())});
      std::memset(data, held.back().value, bytes);
    }
  }
  return true;
}

}  // namespace

int main(int argc, char**) {
  std::atomic<bool> well{true};
  std::atomic<int> running{3};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      if (!come_and_go(t, 2000)) well = false;
      --running;
    });
  // Any argument: forks too, until the threads are done.
  for (unsigned seed = 100; argc > 1 && running > 0; ++seed) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // ends one that waits for a lock which nobody holds
      _exit(come_and_go(seed, 20) ? 0 : 1);
    }
    int status;
    if (waitpid(child, &status, 0) != child || status != 0) well = false;
    if (!well) break;
  }
  for (auto& t : threads) t.join();
  std::puts(well ? "ok" : "a weight was lost, or a child");
  return well ? 0 : 1;
}
