#include "cuda/emulate/banks.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace pared::cuda::emulate {
namespace {

constexpr int kLanes = 32, kBanks = 32, kWord = 4;
constexpr size_t kMostBytes = 16;

struct Access {
  uint64_t place;  // with the calls that lead there
  Touch what;
  Where where;
  const void* pc;
  int64_t offset;
  int bytes;
};

struct Thread {
  std::vector<Access> accesses;
  std::vector<uint64_t> calls;  // a number for each call that has not returned, and those around it
};

struct Counts {
  int64_t instructions = 0, taken = 0, least = 0;
  int worst = 0;
};
// kernel, what, file, line, pc, bytes
using Key = std::tuple<std::string, Touch, std::string, int, const void*, int>;

std::string kernel;
std::vector<Thread> threads;
std::map<Key, Counts> found;

uint64_t mix(uint64_t a, uint64_t b) { return (a ^ b) * 0x9e3779b97f4a7c15u + (a << 7 | a >> 57); }

void settle_warp(int first, int end) {
  // What lane l did at a place for the n-th time.
  struct Instruction {
    const Access* access;
    int64_t at[kLanes];
  };
  std::map<std::pair<uint64_t, int>, Instruction> instructions;
  for (int t = first; t < end; ++t) {
    std::unordered_map<uint64_t, int> times;
    for (const Access& a : threads[t].accesses) {
      const auto [i, fresh] = instructions.try_emplace({a.place, times[a.place]++}, Instruction{&a, {}});
      if (fresh) std::fill(i->second.at, i->second.at + kLanes, int64_t{-1});
      i->second.at[t - first] = a.offset;
    }
  }
  for (const auto& [key, instruction] : instructions) {
    const Access& a = *instruction.access;
    const BankTurns turns = bank_turns(instruction.at, a.bytes);
    Counts& c = found[{kernel, a.what, a.where.file ? a.where.file : "", a.where.line, a.pc, a.bytes}];
    ++c.instructions;
    c.taken += turns.taken;
    c.least += turns.least;
    c.worst = std::max(c.worst, (turns.taken + turns.least - 1) / turns.least);
  }
  for (int t = first; t < end; ++t) threads[t].accesses.clear();
}

}  // namespace

BankTurns bank_turns(const int64_t (&at)[32], int bytes) {
  const int together = bytes <= kWord ? kLanes : kLanes * kWord / bytes;
  BankTurns turns{0, 0};
  for (int first = 0; first < kLanes; first += together) {
    std::vector<int64_t> words;
    for (int lane = first; lane < first + together; ++lane)
      if (at[lane] >= 0)
        for (int64_t word = at[lane] / kWord; word <= (at[lane] + bytes - 1) / kWord; ++word)
          words.push_back(word);
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int of_bank[kBanks] = {};
    for (const int64_t word : words) ++of_bank[word % kBanks];
    turns.taken += *std::max_element(of_bank, of_bank + kBanks);
    ++turns.least;
  }
  return turns;
}

void note_access(int thread, Touch what, Where where, const void* pc, size_t offset, size_t bytes) {
  Thread& t = threads[thread];
  uint64_t place = mix(t.calls.empty() ? 0 : t.calls.back(), reinterpret_cast<uintptr_t>(pc));
  place = mix(place, mix(reinterpret_cast<uintptr_t>(where.file), static_cast<uint64_t>(where.line)));
  // A structure takes as many instructions as its size and place allow.
  const size_t each = (offset | bytes | kMostBytes) & -(offset | bytes | kMostBytes);
  for (size_t done = 0; done < bytes; done += each)
    t.accesses.push_back(
        {place + done, what, where, pc, static_cast<int64_t>(offset + done), static_cast<int>(each)});
}

void note_call(int thread, const void* caller) {
  auto& calls = threads[thread].calls;
  calls.push_back(mix(calls.empty() ? 0 : calls.back(), reinterpret_cast<uintptr_t>(caller)));
}

void note_return(int thread) {
  auto& calls = threads[thread].calls;
  if (!calls.empty()) calls.pop_back();
}

void begin_notes(const char* name, int count) {
  kernel = name;
  threads.assign(static_cast<size_t>(count), {});
}

void settle_notes(int first, int end) {
  for (; first < end; first += kLanes) settle_warp(first, std::min(first + kLanes, end));
}

namespace {

uint64_t offset_of(const void* pc) {
  Dl_info module;
  dladdr(reinterpret_cast<const void*>(&take_banks), &module);
  return static_cast<uint64_t>(static_cast<const char*>(pc) - static_cast<const char*>(module.dli_fbase));
}

}  // namespace

std::string place_name(Where where, const void* pc) {
  if (!pc) {
    const std::string file = where.file ? where.file : "?";
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line);
  }
  static const char kDigits[] = "0123456789abcdef";
  std::string text;
  for (uint64_t offset = offset_of(pc) - 1; offset; offset /= 16)
    text.insert(text.begin(), kDigits[offset % 16]);
  return "0x" + text;
}

std::vector<BankUse> take_banks() {
  static const char* const kNames[] = {"read", "write", "atomic", "cp.async", "ldmatrix"};
  std::vector<BankUse> uses;
  for (const auto& [key, c] : std::exchange(found, {})) {
    const auto& [of, what, file, line, pc, bytes] = key;
    BankUse u{of, kNames[static_cast<int>(what)], "", 0, bytes, c.instructions, c.taken, c.least, c.worst};
    if (pc) u.offset = offset_of(pc);
    else u.where = place_name({file.c_str(), line}, nullptr);
    uses.push_back(std::move(u));
  }
  return uses;
}

}  // namespace pared::cuda::emulate
