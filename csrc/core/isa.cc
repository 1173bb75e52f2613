#include "core/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace pared {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar",      "avx2", "avxvnni", "avx512",  "avx512vnni",
                                           "avx512vbmi2", "neon", "neondot", "neoni8mm"};

#if defined(__x86_64__)

// XCR0: which register files the operating system saves on a context switch. Without the bit the
// instruction faults, whatever CPUID says of the processor. Inline assembly, so that this file needs no
// flags.
uint64_t read_xcr0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

// The highest level without regard to avxvnni, which has a bit of its own.
Isa detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::scalar;
  const bool osxsave = c & bit_OSXSAVE, avx = c & bit_AVX, fma = c & bit_FMA, f16c = c & bit_F16C,
             popcnt = c & bit_POPCNT;
  if (!(osxsave && avx && fma && f16c && popcnt)) return Isa::scalar;
  const uint64_t xcr0 = read_xcr0();
  constexpr uint64_t kYmm = 0x6;   // XMM, upper YMM
  constexpr uint64_t kZmm = 0xe6;  // and opmask, upper ZMM, ZMM16-31
  if ((xcr0 & kYmm) != kYmm) return Isa::scalar;
  uint32_t a80, b80, c80 = 0, d80;
  const bool lzcnt = __get_cpuid(0x80000001u, &a80, &b80, &c80, &d80) && (c80 & (1u << 5));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::scalar;
  const bool avx2 = b & bit_AVX2, bmi = b & bit_BMI, bmi2 = b & bit_BMI2;
  if (!(avx2 && bmi && bmi2 && lzcnt)) return Isa::scalar;
  constexpr uint32_t kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL | bit_AVX512CD;
  if ((xcr0 & kZmm) != kZmm || (b & kAvx512) != kAvx512) return Isa::avx2;
  if (!(c & bit_AVX512VNNI)) return Isa::avx512;
  if (!((c & bit_AVX512VBMI) && (c & bit_AVX512VBMI2))) return Isa::avx512vnni;
  return Isa::avx512vbmi2;
}

bool detect_avxvnni() {
#if defined(PARED_AVXVNNI)
  uint32_t a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
#else
  return false;  // the compiler did not know it
#endif
}

#else

#if defined(__aarch64__)

#if defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
// By number: older headers lack the names.
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }    // HWCAP2_I8MM
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

Isa detect() {
  if (!has_dotprod()) return Isa::neon;
#if defined(PARED_I8MM)
  if (has_i8mm()) return Isa::neoni8mm;
#endif
  return Isa::neondot;
}

#else
Isa detect() { return Isa::scalar; }
#endif

bool detect_avxvnni() { return false; }

#endif

struct Detected {
  Isa highest;
  bool avxvnni;
};

const Detected& detected() {
  static const Detected found = [] {
    const Isa isa = detect();
    const bool avxvnni = isa >= Isa::avx2 && detect_avxvnni();
    return Detected{avxvnni ? std::max(isa, Isa::avxvnni) : isa, avxvnni};
  }();
  return found;
}

Isa parse(const std::string& name, const char* what) {
  for (Isa isa : supported_isas())
    if (name == isa_name(isa)) return isa;
  std::string choices;
  for (Isa isa : supported_isas()) choices += str(choices.empty() ? "" : ", ", isa_name(isa));
  bool known = false;
  for (const char* n : kNames) known = known || name == n;
  throw ValueError(str(what, ": expected one of ", choices, " on this machine, got '", name, "'",
                       known ? " (not supported by this processor or operating system)" : ""));
}

constexpr int kUnset = -1;
std::atomic<int> g_active{kUnset};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) {
  return isa == Isa::avxvnni ? detected().avxvnni : isa_contains(detected().highest, isa);
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> out;
  for (int i = 0; i < kIsaCount; ++i)
    if (isa_supported(static_cast<Isa>(i))) out.push_back(static_cast<Isa>(i));
  return out;
}

Isa active_isa() {
  int v = g_active.load(std::memory_order_relaxed);
  if (v == kUnset) {
    const char* env = std::getenv("PARED_ISA");
    v = static_cast<int>(env && *env ? parse(env, "PARED_ISA") : detected().highest);
    g_active.store(v, std::memory_order_relaxed);
  }
  return static_cast<Isa>(v);
}

Isa set_active_isa(const std::string& name) {
  const Isa wanted = parse(name, "isa");
  active_isa();  // PARED_ISA may not have been read yet
  return static_cast<Isa>(g_active.exchange(static_cast<int>(wanted), std::memory_order_relaxed));
}

std::string cpu_brand() {
#if defined(__x86_64__)
  uint32_t r[12];
  for (uint32_t i = 0; i < 3; ++i)
    if (!__get_cpuid(0x80000002u + i, &r[4 * i], &r[4 * i + 1], &r[4 * i + 2], &r[4 * i + 3]))
      return "x86-64";
  char text[49] = {};
  std::memcpy(text, r, 48);
  std::string s(text);
  const auto first = s.find_first_not_of(' ');
  const auto last = s.find_last_not_of(" ");
  return first == std::string::npos ? "x86-64" : s.substr(first, last - first + 1);
#elif defined(__aarch64__) && defined(__APPLE__)
  char text[128] = {};
  size_t size = sizeof(text) - 1;
  return sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0 ? text : "AArch64";
#elif defined(__aarch64__) && defined(__linux__)
  if (!(getauxval(AT_HWCAP) >> 11 & 1)) return "AArch64";  // HWCAP_CPUID: the kernel lets programs read this
  uint64_t midr;
  __asm__("mrs %0, midr_el1" : "=r"(midr));
  char text[48];
  std::snprintf(text, sizeof(text), "AArch64, implementer 0x%02x, part 0x%03x",
                static_cast<unsigned>(midr >> 24 & 0xff), static_cast<unsigned>(midr >> 4 & 0xfff));
  return text;
#else
  return "unknown";
#endif
}

}  // namespace pared
