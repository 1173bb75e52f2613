#include "kernels/registry.h"

#include <stdexcept>

namespace pared {

// Declarations of every kernel of this architecture.
#if defined(__x86_64__)
#define PARED_IF_ISA_avx2(...) __VA_ARGS__
#define PARED_IF_ISA_avx512(...) __VA_ARGS__
#define PARED_IF_ISA_avx512vnni(...) __VA_ARGS__
#define PARED_IF_ISA_avx512vbmi2(...) __VA_ARGS__
#else
#define PARED_IF_ISA_avx2(...)
#define PARED_IF_ISA_avx512(...)
#define PARED_IF_ISA_avx512vnni(...)
#define PARED_IF_ISA_avx512vbmi2(...)
#endif
#if defined(__aarch64__)
#define PARED_IF_ISA_neon(...) __VA_ARGS__
#define PARED_IF_ISA_neondot(...) __VA_ARGS__
#else
#define PARED_IF_ISA_neon(...)
#define PARED_IF_ISA_neondot(...)
#endif
#if defined(PARED_I8MM)
#define PARED_IF_ISA_neoni8mm(...) __VA_ARGS__
#else
#define PARED_IF_ISA_neoni8mm(...)
#endif
#if defined(PARED_AVXVNNI)
#define PARED_IF_ISA_avxvnni(...) __VA_ARGS__
#else
#define PARED_IF_ISA_avxvnni(...)
#endif
#define PARED_IF_ISA_scalar(...) __VA_ARGS__

namespace {
template <class Op, class = void>
struct Declared {
  using type = typename Op::Fn;
};
template <class Op>
struct Declared<Op, std::void_t<typename Op::Table>> {
  using type = typename Op::Table;
};
}  // namespace

#define PARED_KERNEL(op, variant, isa) PARED_IF_ISA_##isa(extern Declared<op>::type op##_##variant##__##isa;)
#include "kernels/kernels.def"
#undef PARED_KERNEL

namespace {

// One index for each kernel of this architecture.
enum KernelId {
#define PARED_KERNEL(op, variant, isa) PARED_IF_ISA_##isa(id_##op##_##variant##__##isa, )
#include "kernels/kernels.def"
#undef PARED_KERNEL
  kKernelCount
};
std::atomic<bool> g_dispatched[kKernelCount];

// What is known of each without its type: rows of a table, which compile in a third of the time of a
// statement each.
struct Row {
  const char *name, *op, *isa_name, *doc;
  Isa isa;
};
constexpr Row kRows[] = {
#define PARED_KERNEL(op, variant, isa) \
  PARED_IF_ISA_##isa({#op "_" #variant "__" #isa, #op, #isa, op::doc, Isa::isa}, )
#include "kernels/kernels.def"
#undef PARED_KERNEL
};

}  // namespace

template <class Op>
const std::vector<Kernel<Op>>& kernels() {
  static const std::vector<Kernel<Op>> table = [] {
    std::vector<Kernel<Op>> t;
#define PARED_KERNEL(op, variant, isa)                                              \
  PARED_IF_ISA_##isa(if constexpr (std::is_same_v<op, Op>) t.push_back(             \
      {kRows[id_##op##_##variant##__##isa].name, Isa::isa, op##_##variant##__##isa, \
       &g_dispatched[id_##op##_##variant##__##isa]});)
#include "kernels/kernels.def"
#undef PARED_KERNEL
    return t;
  }();
  return table;
}

template <class Op>
const Kernel<Op>& kernel_for(Isa isa) {
  const Kernel<Op>* best = nullptr;
  for (const auto& k : kernels<Op>())
    if (isa_contains(isa, k.isa) && (!best || k.isa > best->isa)) best = &k;
  if (!best) throw std::logic_error("an op without a scalar kernel");
  return best->mark();
}

#define PARED_OP(op)                                     \
  template const std::vector<Kernel<op>>& kernels<op>(); \
  template const Kernel<op>& kernel_for<op>(Isa);
#include "kernels/ops.def"
#undef PARED_OP

std::vector<KernelInfo> all_kernels() {
  std::vector<KernelInfo> out;
  for (const Row& r : kRows) out.push_back({r.name, r.op, r.isa_name, r.doc, isa_supported(r.isa)});
  return out;
}

std::vector<std::string> take_dispatched() {
  std::vector<std::string> out;
  for (int id = 0; id < kKernelCount; ++id)
    if (g_dispatched[id].exchange(false)) out.push_back(kRows[id].name);
  return out;
}

}  // namespace pared
