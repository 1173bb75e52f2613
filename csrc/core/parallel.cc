#include "core/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>
#include <time.h>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "core/backoff.h"
#include "core/check.h"

namespace pared {
namespace {

thread_local bool t_in_region = false;

using Clock = std::chrono::steady_clock;

int64_t nanoseconds(Clock::duration d) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(d).count();
}

// Processor time of the calling thread, in ns. A system call: asked for where a loop took long, and once a
// millisecond.
int64_t processor_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return int64_t{1'000'000'000} * t.tv_sec + t.tv_nsec;
}

constexpr auto kLong = std::chrono::milliseconds(1);

// The processor time that a thread has used since not much more than a millisecond before its loop.
struct Used {
  Clock::time_point when{};
  int64_t at = 0;
  void renew(Clock::time_point now) {
    if (now - when <= kLong) return;
    when = now;
    at = processor_time();
  }
};
thread_local Used t_used;

Backoff g_backoff;

// One call of parallel_for. Runs ranges on whichever threads bring them and keeps the first exception: none
// may leave through a worker's stack or through torch's C interface.
class Loop {
 public:
  explicit Loop(RangeFn fn) : fn_(fn), caller_(&t_in_region), begin_(Clock::now()) { t_used.renew(begin_); }

  void operator()(int64_t begin, int64_t end) noexcept {
    if (failed_.load(std::memory_order_relaxed)) return;
    const bool outer = t_in_region;
    t_in_region = true;
    try {
      fn_(begin, end);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
    }
    t_in_region = outer;
    if (&t_in_region != caller_) return;
    const auto now = Clock::now();
    own_ = nanoseconds(now - begin_);
    if (now - begin_ > kLong) own_ = std::min(own_, processor_time() - t_used.at);
  }

  // To be called once every range has returned, by the thread that made the loop.
  void finish() const {
    g_backoff.shared(own_, nanoseconds(Clock::now() - begin_));
    if (error_) std::rethrow_exception(error_);
  }

 private:
  RangeFn fn_;
  const bool* const caller_;  // a variable of the thread stands for it
  const Clock::time_point begin_;
  int64_t own_ = 0;  // what the caller worked, in ns: without the time in which it could not run
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// ---- torch's pool, through the C symbols that libtorch_cpu exports since torch 2.10
// (torch/csrc/stable/c/shim.h). Found at run time, so that nothing links torch.
struct TorchPool {
  int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
  int32_t (*get_num_threads)(uint32_t*);
};

// Grows with every library that the process loads.
uint64_t libraries_loaded() {
#if defined(__APPLE__)
  return _dyld_image_count();
#else
  uint64_t adds = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        *static_cast<uint64_t*>(out) = info->dlpi_adds;
        return 1;  // the first entry tells
      },
      &adds);
  return adds;
#endif
}

const TorchPool* find_torch() {
  // RTLD_NOLOAD: only when the process has loaded it already. dlsym(RTLD_DEFAULT) would not see it, because
  // Python loads extension modules with local symbols. The handle is kept: torch is never unloaded.
#if defined(__APPLE__)
  void* lib = dlopen("@rpath/libtorch_cpu.dylib", RTLD_LAZY | RTLD_NOLOAD);
#else
  void* lib = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
#endif
  if (!lib) return nullptr;
  const auto loop = reinterpret_cast<decltype(TorchPool::parallel_for)>(dlsym(lib, "torch_parallel_for"));
  const auto threads =
      reinterpret_cast<decltype(TorchPool::get_num_threads)>(dlsym(lib, "torch_get_num_threads"));
  if (!loop || !threads) return nullptr;  // torch < 2.10: our own pool serves
  static const TorchPool pool{loop, threads};
  return &pool;
}

const TorchPool* torch_pool() {
  static std::atomic<const TorchPool*> found{nullptr};
  if (const TorchPool* p = found.load(std::memory_order_acquire)) return p;
  // Without torch, dlopen searches the disk on every call (18 us). It is asked again only once something has
  // been loaded since, which takes 60 ns to know.
  static std::atomic<uint64_t> searched{0};
  const uint64_t loaded = libraries_loaded();
  if (searched.load(std::memory_order_relaxed) == loaded) return nullptr;
  const TorchPool* p = find_torch();
  if (p) found.store(p, std::memory_order_release);
  else searched.store(loaded, std::memory_order_relaxed);
  return p;
}

int torch_threads(const TorchPool& torch) {
  uint32_t n = 1;
  return torch.get_num_threads(&n) == 0 ? std::max(1, static_cast<int>(n)) : 1;
}

// ---- the pool for processes without torch

// Workers are started when a loop first has work for them and then wait for the next one.
//
// A loop is open while loop_ is set. A worker joins only an open loop that still has items, under the mutex,
// and run() returns only when every worker that joined has left: a worker that wakes late finds nothing to
// join, never the variables of a loop that is over. Nobody waits for a worker that did not join.
class OwnPool {
 public:
  void run(int64_t begin, int64_t end, int64_t chunk, Loop& loop) {
    // One loop at a time. A caller that finds the pool busy (another Python thread) runs its loop alone: the
    // cores are taken already.
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return loop(begin, end);
    const int helpers = start_workers((end - begin - 1) / chunk);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      next_.store(begin, std::memory_order_relaxed);
      end_ = end;
      chunk_ = chunk;
      loop_ = &loop;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    drain(loop);
    std::unique_lock<std::mutex> lock(mutex_);
    loop_ = nullptr;
    left_.wait(lock, [&] { return joined_ == 0; });
  }

 private:
  // Makes sure of `wanted` workers and returns how many of them there are.
  int start_workers(int64_t wanted) {
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {  // out of threads: fewer of them do the same work
    }
    return static_cast<int>(std::min<int64_t>(wanted, workers_));
  }

  void drain(Loop& loop) {
    for (;;) {
      const int64_t b = next_.fetch_add(chunk_, std::memory_order_relaxed);
      if (b >= end_) return;
      loop(b, std::min(end_, b + chunk_));
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return loop_ && next_.load(std::memory_order_relaxed) < end_; });
      Loop& loop = *loop_;
      ++joined_;
      lock.unlock();
      drain(loop);
      lock.lock();
      if (--joined_ == 0) left_.notify_one();
    }
  }

  std::mutex owner_;  // held for a whole loop; guards workers_
  int64_t workers_ = 0;

  std::mutex mutex_;  // guards what follows; end_ and chunk_ change only while nobody has joined
  std::condition_variable wake_, left_;
  Loop* loop_ = nullptr;
  int joined_ = 0;
  std::atomic<int64_t> next_{0};
  int64_t end_ = 0, chunk_ = 1;
};

// Leaked on purpose: workers may still wait on it while static destructors run.
std::atomic<OwnPool*> g_pool{nullptr};

OwnPool& own_pool() {
  OwnPool* p = g_pool.load(std::memory_order_acquire);
  if (p) return *p;
  auto* fresh = new OwnPool();
  if (g_pool.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;  // another thread was first; nothing has used this one
  return *p;
}

// ---- fork. The child has only the thread that forked. Our workers are gone, so it starts a pool of its own.
// torch's are gone too, but libgomp goes on waiting for them: the child's first parallel region would never
// end (torch's own operations hang there). Where the parent had other threads, the child runs on our pool.
std::atomic<bool> g_torch_pool_lost{false};
std::atomic<bool> g_forks_with_threads{false};

void before_fork() {
#if defined(__linux__)
  struct stat task;  // its links are ".", ".." and one a thread
  g_forks_with_threads = stat("/proc/self/task", &task) != 0 || task.st_nlink != 3;
#else
  g_forks_with_threads = true;
#endif
}

void after_fork_in_child() {
  g_pool.store(nullptr);
  if (g_forks_with_threads) g_torch_pool_lost.store(true);
}

[[maybe_unused]] const int g_at_fork = pthread_atfork(before_fork, nullptr, after_fork_in_child);

int read_own_threads() {
  const auto parse = [](const char* text, const char* stops) {
    char* end;
    const long n = std::strtol(text, &end, 10);
    const bool ok = end != text && (*end == 0 || *end == *stops) && n >= 1 && n <= 4096;
    return ok ? static_cast<int>(n) : 0;
  };
  if (const char* text = std::getenv("PARED_NUM_THREADS"); text && *text) {
    const int n = parse(text, "");
    PARED_CHECK(n, "PARED_NUM_THREADS: expected a number from 1 to 4096, got '", text, "'");
    return n;
  }
  if (const char* text = std::getenv("OMP_NUM_THREADS"))
    if (const int n = parse(text, ",")) return n;  // "4,2": one number a nesting level
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int own_threads() {
  static const int n = read_own_threads();
  return n;
}

int num_threads() {
  if (t_in_region) return 1;
  const TorchPool* torch = torch_pool();
  return torch ? torch_threads(*torch) : own_threads();
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn fn) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  if (end - begin <= grain || t_in_region) return fn(begin, end);

  const TorchPool* torch = torch_pool();
  const int64_t threads = torch ? torch_threads(*torch) : own_threads();
  if (threads == 1) return fn(begin, end);
  if (g_backoff.alone()) {
    const auto start = Clock::now();
    fn(begin, end);
    g_backoff.alone(nanoseconds(Clock::now() - start), threads);
    return;
  }
  Loop loop(fn);
  if (torch && !g_torch_pool_lost.load(std::memory_order_relaxed)) {
    const auto body = [](int64_t b, int64_t e, void* ctx) { (*static_cast<Loop*>(ctx))(b, e); };
    const int32_t status = torch->parallel_for(begin, end, grain, body, &loop);
    loop.finish();
    if (status != 0) throw std::runtime_error("torch_parallel_for failed");
    return;
  }
  const int64_t per_thread = (end - begin + threads - 1) / threads;
  own_pool().run(begin, end, std::max(grain, per_thread), loop);
  loop.finish();
}

void set_parallel_backoff(bool on) { g_backoff.set(on); }

double parallel_owed() { return 1e-9 * static_cast<double>(g_backoff.owed()); }

const char* parallel_backend() {
  return torch_pool() && !g_torch_pool_lost.load(std::memory_order_relaxed) ? "torch" : "std::thread";
}

}  // namespace pared
