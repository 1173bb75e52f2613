// What kernels.def becomes: a table of typed entries for each op, and the choice of one by level.
#pragma once

#include <atomic>
#include <string>
#include <type_traits>
#include <vector>

#include "core/isa.h"
#include "kernels/types.h"

namespace pared {

// Ops whose kernels come as a table of functions (one for each tile size) declare `Table`; the others are
// one function.
template <class Op, class = void>
struct KernelSymbol {
  using type = typename Op::Fn*;
};
template <class Op>
struct KernelSymbol<Op, std::void_t<typename Op::Table>> {
  using type = typename Op::Fn* const*;
};

template <class Op>
struct Kernel {
  const char* name;  // <op>_<variant>__<isa>
  Isa isa;
  typename KernelSymbol<Op>::type fn;
  std::atomic<bool>* dispatched;

  // Notes that this kernel is about to run, for take_dispatched. kernel_for does it; code that picks another
  // variant from kernels() does it too. The load first: the flag's cache line stays shared between threads.
  const Kernel& mark() const {
    if (!dispatched->load(std::memory_order_relaxed)) dispatched->store(true, std::memory_order_relaxed);
    return *this;
  }
};

// Every kernel of an op that this build contains, lowest level first.
template <class Op>
const std::vector<Kernel<Op>>& kernels();

// The default kernel of an op: the first listed one of the highest level that `isa` contains.
template <class Op>
const Kernel<Op>& kernel_for(Isa isa);

struct KernelInfo {
  std::string name, op, isa, doc;
  bool supported;  // by this machine
};
std::vector<KernelInfo> all_kernels();

// Names of the kernels that dispatch has chosen since the last call. The tests prove with it that a forced
// level really ran, and that no listed kernel goes untested.
std::vector<std::string> take_dispatched();

}  // namespace pared
