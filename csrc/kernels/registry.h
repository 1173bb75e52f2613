// What kernels.def becomes: a table of typed entries for each op, and the choice of one by level.
#pragma once

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
};

// Every kernel of an op that this build contains, lowest level first.
template <class Op>
const std::vector<Kernel<Op>>& kernels();

// The default kernel of an op: the first listed one of the highest level up to `isa`.
template <class Op>
const Kernel<Op>& kernel_for(Isa isa);

struct KernelInfo {
  std::string name, op, isa, doc;
  bool supported;  // by this machine
};
std::vector<KernelInfo> all_kernels();

}  // namespace pared
