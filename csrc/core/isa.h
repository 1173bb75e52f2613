// Instruction-set levels, what this machine supports, and which one is in force.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pared {

// Ordered by what is preferred, x86-64 before AArch64. A level contains those of its architecture before it,
// but for avxvnni: vpdpbusd on 256-bit vectors, without AVX-512 (Alder Lake and later), is no part of the
// levels behind it, whose first processors lack it.
enum class Isa : uint8_t {
  scalar,
  avx2,
  avxvnni,
  avx512,
  avx512vnni,
  avx512vbmi2,
  neon,      // what every AArch64 processor has
  neondot,   // and sdot, udot (Cortex-A76, Neoverse N1, Apple M1)
  neoni8mm,  // and usdot: bytes of either sign (Neoverse V1 and N2, Apple M2)
};
inline constexpr int kIsaCount = 9;

// Whether code of level `part` runs where `level` is in force.
constexpr bool isa_contains(Isa level, Isa part) {
  const bool arm = level >= Isa::neon;
  return part == level || part == Isa::scalar ||
         (part < level && part != Isa::avxvnni && (part >= Isa::neon) == arm);
}

const char* isa_name(Isa isa);

// True when the processor has the instructions and the operating system saves the registers they use.
bool isa_supported(Isa isa);
std::vector<Isa> supported_isas();

// The level that dispatch uses: PARED_ISA if set, else the highest supported one.
// Throws ValueError when PARED_ISA names a level that is unknown or unsupported here.
Isa active_isa();

// Forces a level for the whole process from now on (tests, benches); returns the one before. Throws
// ValueError as above. An operation that another thread has begun may go on with kernels of either level, or
// of both: what they hand to each other is laid out alike on all levels.
Isa set_active_isa(const std::string& name);

// The processor's brand string, for reports.
std::string cpu_brand();

}  // namespace pared
