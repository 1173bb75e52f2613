// Races in shared memory: two threads of a block at the same bytes, one of them to write, and nothing between
// that puts one before the other, whatever the order in which they happened to run. What orders threads is a
// barrier, __syncwarp, and the arrival at an mbarrier before a wait for it; shuffles and votes do not. A
// thread counts what it does in rounds, one more behind each of these, and knows of every other the rounds
// that are before it (as FastTrack, PLDI 2009).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/emulate/simt.h"

namespace pared::cuda::emulate {

class Races {
 public:
  using Rounds = std::vector<uint32_t>;  // of each thread, up to which they are known

  void begin(int threads);
  // Empty, or what is wrong with this access.
  std::string access(int thread, size_t offset, size_t bytes, Touch what, Where where, const void* pc);

  // All threads of the block have met: whatever was, was before.
  void all_met();
  void met(const std::vector<int>& threads);
  // What `thread` did is handed on through a barrier, and taken from there by those who waited for it.
  void give(int thread, Rounds& through);
  void take(int thread, const Rounds& through);
  // A copy of the engine: `round` as it was when `thread` asked for it.
  uint32_t round(int thread) const;
  static void give_round(int thread, uint32_t round, Rounds& through);

 private:
  struct Mark {
    int thread;
    uint32_t round;
  };
  struct Cell {          // two bytes
    uint64_t since = 0;  // which meeting of all; what was before it is forgotten
    Mark write{-1, 0};
    bool atomic = false;
    Where where{nullptr, 0};
    const void* pc = nullptr;
    std::vector<Mark> reads;
  };
  bool before(const Mark& mark, int thread) const;

  std::vector<Rounds> known_;
  std::vector<Cell> cells_;
  uint64_t meetings_ = 0;
};

}  // namespace pared::cuda::emulate
