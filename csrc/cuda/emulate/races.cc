#include "cuda/emulate/races.h"

#include <algorithm>

#include "core/check.h"
#include "cuda/emulate/banks.h"

namespace pared::cuda::emulate {

void Races::begin(int threads) {
  known_.assign(static_cast<size_t>(threads), Rounds(static_cast<size_t>(threads), 0));
  for (int t = 0; t < threads; ++t) known_[t][t] = 1;
  all_met();
}

bool Races::before(const Mark& mark, int thread) const {
  return mark.thread < 0 || mark.round <= known_[thread][mark.thread];
}

std::string Races::access(int thread, size_t offset, size_t bytes, Touch what, Where where, const void* pc) {
  const bool reads = what == Touch::read || what == Touch::matrix, atomic = what == Touch::atomic;
  const Mark mine{thread, known_[thread][thread]};
  for (size_t at = offset / 2; at <= (offset + bytes - 1) / 2; ++at) {
    if (at >= cells_.size()) cells_.resize(at + 1);
    Cell& cell = cells_[at];
    if (cell.since != meetings_) {
      cell.since = meetings_;
      cell.write = {-1, 0};
      cell.reads.clear();
    }
    if (!before(cell.write, thread) && !(atomic && cell.atomic))
      return str("a race: it ", reads ? "reads" : "writes", " shared memory that thread ", cell.write.thread,
                 " writes in ", place_name(cell.where, cell.pc));
    if (reads) {
      const auto same = std::find_if(cell.reads.begin(), cell.reads.end(),
                                     [&](const Mark& m) { return m.thread == thread; });
      if (same != cell.reads.end()) same->round = mine.round;
      else cell.reads.push_back(mine);
      continue;
    }
    for (const Mark& read : cell.reads)
      if (!before(read, thread))
        return str("a race: it writes shared memory that thread ", read.thread, " reads");
    cell.reads.clear();
    cell.write = mine;
    cell.atomic = atomic;
    cell.where = where;
    cell.pc = pc;
  }
  return {};
}

void Races::all_met() { ++meetings_; }

void Races::met(const std::vector<int>& threads) {
  Rounds all(known_.size(), 0);
  for (const int t : threads) give(t, all);
  for (const int t : threads) take(t, all);
}

void Races::give(int thread, Rounds& through) {
  through.resize(known_.size(), 0);
  for (size_t i = 0; i < through.size(); ++i) through[i] = std::max(through[i], known_[thread][i]);
  ++known_[thread][thread];
}

void Races::take(int thread, const Rounds& through) {
  for (size_t i = 0; i < through.size(); ++i)
    if (static_cast<int>(i) != thread) known_[thread][i] = std::max(known_[thread][i], through[i]);
}

uint32_t Races::round(int thread) const { return known_[thread][thread]; }

void Races::give_round(int thread, uint32_t round, Rounds& through) {
  through.resize(std::max(through.size(), static_cast<size_t>(thread) + 1), 0);
  through[thread] = std::max(through[thread], round);
}

}  // namespace pared::cuda::emulate
