#include "core/weight_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "core/aligned.h"
#include "core/huge_pages.h"

// Where accesses behind a weight are to be found, each has memory of its own.
#if defined(__linux__) && defined(MADV_HUGEPAGE) && !defined(__SANITIZE_ADDRESS__)
#define PARED_SHARED_PAGES 1
#include <pthread.h>
#endif

namespace pared {
namespace {

#if defined(PARED_SHARED_PAGES)

// First fit in mappings of address space, which takes memory where weights lie alone: pages that a freed
// weight leaves empty go back to the system.
class Arena {
 public:
  static constexpr size_t kChunk = size_t{64} << 20;
  static constexpr size_t kLargest = kChunk / 2;

  void* allocate(size_t bytes) {
    bytes = round_up(bytes, kCacheLine);
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [base, chunk] : chunks_)
      for (auto gap = chunk.gaps.begin(); gap != chunk.gaps.end(); ++gap)
        if (gap->second >= bytes) return take(chunk, base, gap, bytes);
    const uintptr_t base = map_chunk();
    if (!base) return nullptr;
    Chunk& chunk = chunks_[base];
    return take(chunk, base, chunk.gaps.emplace(0, kChunk).first, bytes);
  }

  // False where `data` is not of this arena.
  bool free(void* data) {
    const auto at = reinterpret_cast<uintptr_t>(data);
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = chunks_.upper_bound(at);
    if (found == chunks_.begin()) return false;
    auto& [base, chunk] = *--found;
    if (at - base >= kChunk) return false;
    auto used = chunk.used.extract(at - base);
    const size_t first = used.key(), end = first + used.mapped();
    if (chunk.used.empty()) {
      munmap(reinterpret_cast<void*>(base), kChunk);
      chunks_.erase(found);
      return true;
    }
    auto gap = chunk.gaps.insert(std::move(used)).position;
    if (const auto next = std::next(gap); next != chunk.gaps.end() && next->first == end) {
      gap->second += next->second;
      chunk.gaps.erase(next);
    }
    if (gap != chunk.gaps.begin())
      if (const auto before = std::prev(gap); before->first + before->second == first) {
        before->second += gap->second;
        chunk.gaps.erase(gap);
        gap = before;
      }
    // Of the pages that the weight was in, those that now lie in the gap.
    const size_t from = std::max(first / kHugePage * kHugePage, round_up(gap->first, kHugePage));
    const size_t to = std::min(round_up(end, kHugePage), (gap->first + gap->second) / kHugePage * kHugePage);
    if (from < to) madvise(reinterpret_cast<void*>(base + from), to - from, MADV_DONTNEED);
    return true;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  using Ranges = std::map<size_t, size_t>;  // offset -> bytes
  struct Chunk {
    Ranges gaps, used;
  };

  static void* take(Chunk& chunk, uintptr_t base, Ranges::iterator gap, size_t bytes) {
    const size_t at = gap->first;
    chunk.used.emplace(at, bytes);
    auto left = chunk.gaps.extract(gap);
    left.key() += bytes;
    left.mapped() -= bytes;
    if (left.mapped() > 0) chunk.gaps.insert(std::move(left));
    return reinterpret_cast<void*>(base + at);
  }

  // Begins with a huge page; 0 where there is no address space left.
  static uintptr_t map_chunk() {
    void* all = mmap(nullptr, kChunk + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return 0;
    const auto begin = reinterpret_cast<uintptr_t>(all), base = round_up(begin, kHugePage);
    if (base > begin) munmap(all, base - begin);
    if (const size_t behind = begin + kHugePage - base)
      munmap(reinterpret_cast<void*>(base + kChunk), behind);
    madvise(reinterpret_cast<void*>(base), kChunk, MADV_HUGEPAGE);
    return base;
  }

  std::mutex mutex_;
  std::map<uintptr_t, Chunk> chunks_;
};

// Leaked on purpose: weights may outlive static destructors. Made when the library is loaded: a process that
// forks while another thread makes it would leave its child waiting for that thread.
Arena& g_arena = *new Arena;

// A child must not inherit a mutex that a thread which it does not have holds.
[[maybe_unused]] const int g_at_fork = pthread_atfork(
    [] { g_arena.mutex().lock(); }, [] { g_arena.mutex().unlock(); }, [] { g_arena.mutex().unlock(); });

#endif

}  // namespace

void* allocate_weight(size_t bytes) {
#if defined(PARED_SHARED_PAGES)
  if (bytes >= kSmallestWeight && bytes <= Arena::kLargest) {
    try {
      if (void* data = g_arena.allocate(bytes)) return data;
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }
#endif
  return allocate_in_huge_pages(bytes);
}

void free_weight(void* data) {
#if defined(PARED_SHARED_PAGES)
  if (g_arena.free(data)) return;
#endif
  std::free(data);
}

}  // namespace pared
