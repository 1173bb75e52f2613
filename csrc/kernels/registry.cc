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

template <class Op, class Wanted, class Symbol>
void add(std::vector<Kernel<Wanted>>& out, const char* name, Isa isa, Symbol& symbol, KernelId id) {
  if constexpr (std::is_same_v<Op, Wanted>) out.push_back({name, isa, symbol, &g_dispatched[id]});
}

}  // namespace

template <class Op>
const std::vector<Kernel<Op>>& kernels() {
  static const std::vector<Kernel<Op>> table = [] {
    std::vector<Kernel<Op>> t;
#define PARED_KERNEL(op, variant, isa)                                                         \
  PARED_IF_ISA_##isa(add<op>(t, #op "_" #variant "__" #isa, Isa::isa, op##_##variant##__##isa, \
                             id_##op##_##variant##__##isa);)
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
    if (k.isa <= isa && (!best || k.isa > best->isa)) best = &k;
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
#define PARED_KERNEL(op, variant, isa) \
  PARED_IF_ISA_##isa(                  \
      out.push_back({#op "_" #variant "__" #isa, #op, #isa, op::doc, isa_supported(Isa::isa)});)
#include "kernels/kernels.def"
#undef PARED_KERNEL
  return out;
}

std::vector<std::string> take_dispatched() {
  std::vector<std::string> out;
#define PARED_KERNEL(op, variant, isa)                                               \
  PARED_IF_ISA_##isa(if (g_dispatched[id_##op##_##variant##__##isa].exchange(false)) \
                         out.push_back(#op "_" #variant "__" #isa);)
#include "kernels/kernels.def"
#undef PARED_KERNEL
  return out;
}

}  // namespace pared
