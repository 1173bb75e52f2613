#include "cuda/launch_number.h"

#include <atomic>
#include <random>

namespace pared::cuda {

uint64_t launch_number() {
  static std::atomic<uint64_t> next = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return next.fetch_add(1, std::memory_order_relaxed) << kTicketCountBits;
}

}  // namespace pared::cuda
