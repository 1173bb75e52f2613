#include "core/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace pared {
namespace {

// ---- torch's pool, through the C symbols that libtorch_cpu exports since torch 2.10
// (torch/csrc/stable/c/shim.h). Found at run time, so that nothing links torch.
struct TorchPool {
  using Body = void (*)(int64_t, int64_t, void*);
  int32_t (*parallel_for)(int64_t, int64_t, int64_t, Body, void*) = nullptr;
  int32_t (*get_num_threads)(uint32_t*) = nullptr;
};

const TorchPool* torch_pool() {
  static std::atomic<const TorchPool*> found{nullptr};
  if (const TorchPool* p = found.load(std::memory_order_acquire)) return p;
  // RTLD_NOLOAD: only when the process has loaded it already. dlsym(RTLD_DEFAULT) would not see it, because
  // Python loads extension modules with local symbols.
#if defined(__APPLE__)
  void* lib = dlopen("@rpath/libtorch_cpu.dylib", RTLD_LAZY | RTLD_NOLOAD);
#else
  void* lib = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
#endif
  if (!lib) return nullptr;
  static TorchPool pool;
  static std::once_flag once;
  std::call_once(once, [&] {
    pool.parallel_for = reinterpret_cast<decltype(pool.parallel_for)>(dlsym(lib, "torch_parallel_for"));
    pool.get_num_threads =
        reinterpret_cast<decltype(pool.get_num_threads)>(dlsym(lib, "torch_get_num_threads"));
    if (pool.parallel_for && pool.get_num_threads) found.store(&pool, std::memory_order_release);
  });
  return found.load(std::memory_order_acquire);  // null on torch < 2.10: our own pool serves
}

// ---- the pool for processes without torch
thread_local bool t_in_region = false;

int default_threads() {
  if (const char* env = std::getenv("PARED_NUM_THREADS")) {
    const int n = std::atoi(env);
    if (n > 0) return n;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

class OwnPool {
 public:
  OwnPool() : size_(default_threads()) {}

  int size() const { return size_; }

  // One loop at a time. A caller that finds the pool busy (another Python thread) runs its loop alone:
  // the cores are taken already.
  void run(int64_t begin, int64_t end, int64_t chunk, RangeFn fn) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return fn(begin, end);
    if (!start_workers()) return fn(begin, end);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      fn_ = &fn;
      next_.store(begin, std::memory_order_relaxed);
      end_ = end;
      chunk_ = chunk;
      pending_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return pending_ == 0; });
    fn_ = nullptr;
  }

 private:
  bool start_workers() {
    if (!workers_.empty()) return true;
    try {
      for (int i = 1; i < size_; ++i) {
        workers_.emplace_back([this] { work(); });
        workers_.back().detach();
      }
    } catch (...) {  // out of threads: fewer workers, or none, do the same work
    }
    return !workers_.empty();
  }

  void drain() {
    t_in_region = true;
    for (;;) {
      const int64_t b = next_.fetch_add(chunk_, std::memory_order_relaxed);
      if (b >= end_) break;
      (*fn_)(b, std::min(end_, b + chunk_));
    }
    t_in_region = false;
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
      }
      drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  const int size_;
  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const RangeFn* fn_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t end_ = 0, chunk_ = 1;
  int pending_ = 0;
  uint64_t generation_ = 0;
};

// Leaked on purpose: workers may still wait on it while static destructors run. A fork leaves the child
// without the workers, so the child starts afresh.
std::atomic<OwnPool*> g_pool{nullptr};

OwnPool& own_pool() {
  OwnPool* p = g_pool.load(std::memory_order_acquire);
  if (p) return *p;
  static std::once_flag atfork;
  std::call_once(atfork, [] { pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); }); });
  auto* fresh = new OwnPool();
  if (g_pool.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *p;
}

}  // namespace

int num_threads() {
  if (const TorchPool* torch = torch_pool()) {
    uint32_t n = 1;
    return torch->get_num_threads(&n) == 0 ? static_cast<int>(n) : 1;
  }
  return t_in_region ? 1 : own_pool().size();
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  if (end - begin <= grain) return fn(begin, end);
  if (const TorchPool* torch = torch_pool()) {
    const auto body = [](int64_t b, int64_t e, void* ctx) { (*static_cast<RangeFn*>(ctx))(b, e); };
    if (torch->parallel_for(begin, end, grain, body, &fn) != 0) fn(begin, end);
    return;
  }
  const int64_t threads = num_threads();
  if (threads == 1) return fn(begin, end);
  const int64_t per_thread = (end - begin + threads - 1) / threads;
  own_pool().run(begin, end, std::max(grain, per_thread), fn);
}

const char* parallel_backend() { return torch_pool() ? "torch" : "std::thread"; }

}  // namespace pared
