// What the accesses of kernels to shared memory cost in banks. A GPU's shared memory has 32 banks of four
// bytes: lanes of a warp that want different words of one bank in the same instruction take turns.
//
// The emulator's threads run one after the other, so an instruction of a warp is put together afterwards:
// what its lanes did at the same place, the same time, between two points where all of them met.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/emulate/simt.h"

namespace pared::cuda::emulate {

// The turns that shared memory takes for one instruction. `at`: where each lane's bytes begin, -1 for a lane
// that takes no part. Eight bytes a lane are asked for by half warps and sixteen by quarters, each of which
// takes a turn at least: `least` are those.
struct BankTurns {
  int taken, least;
};
BankTurns bank_turns(const int64_t (&at)[32], int bytes);

// The accesses of one place in a kernel.
struct BankUse {
  std::string kernel, what;  // read, write, atomic, cp.async, ldmatrix
  std::string where;         // file:line, or empty:
  uint64_t offset;           // of the instruction in this module, for addr2line
  int bytes;                 // of a lane
  int64_t instructions, taken, least;
  int worst;  // turns of the worst instruction over its least, rounded up
};

// Whether accesses are noted. Those that go through functions of ptx.h and atomics are seen in every build,
// all in one with PARED_ACCESSES. Not seen: what the copy engine writes, and what wgmma reads.
void record_banks(bool on);
// What has been noted since the last call.
std::vector<BankUse> take_banks();

// ---- for simt.cc and accesses.cc

// `place`: of which there is one a place in the source; `pc`: of the instruction, where it has no Where.
void note_access(int thread, Touch what, Where where, const void* pc, size_t offset, size_t bytes);
void note_call(int thread, const void* caller);
void note_return(int thread);
// file:line, or of an instruction its offset as addr2line wants it.
std::string place_name(Where where, const void* pc);
void begin_notes(const char* kernel, int threads);
// The threads [first, end) have met.
void settle_notes(int first, int end);

}  // namespace pared::cuda::emulate
