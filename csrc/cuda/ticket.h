// Which of the blocks of threads that share a result is the last to finish, and so has all of their parts,
// with a counter that nobody has to clear: another node of a graph for that would take as long as a small
// product.
#pragma once

#include "cuda/launch_number.h"
#include "cuda/ptx.h"

namespace pared::cuda {

// launch_number(), and in its lowest bits how many blocks of the launch have finished. Any other value counts
// as none: what was in the memory before, and the full count that a graph's launch has left when it is
// replayed.
using Ticket = unsigned long long;
static_assert(sizeof(Ticket) == kTicketBytes);

// By all threads that take part, after each has written its share of the part: whether the block is the last
// of `count` (2 or more). Then the others' parts can be read, past L1. `seen`: what was in the counter a
// while ago; only thread 0's matters. sync(): a barrier of those threads.
//
// Thread 0's fences are everybody's: the first one is behind the barrier to which the others came with their
// writes, the second before the one from which they go on.
template <class Sync>
__device__ __forceinline__ bool last_of(Ticket* counter, Ticket seen, Ticket launch, uint32_t count,
                                        Sync sync) {
  constexpr Ticket kCount = (Ticket{1} << kTicketCountBits) - 1;
  PARED_SHARED(bool[1], last);
  sync();
  if (threadIdx.x == 0) {
    __threadfence();
    uint32_t before;
    while (true) {
      const bool valid = (seen & ~kCount) == launch && (seen & kCount) < count;
      before = valid ? static_cast<uint32_t>(seen & kCount) : 0;
      const Ticket found = atomicCAS(counter, seen, launch + before + 1);
      if (found == seen) break;
      seen = found;
    }
    last[0] = before + 1 == count;
    if (last[0]) __threadfence();
  }
  sync();
  return last[0];
}

}  // namespace pared::cuda
