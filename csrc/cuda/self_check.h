// Each function of ptx.h in a kernel of its own, so that the emulator's twins and the hardware are held to
// the same tests.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace pared::cuda {

// One warp: a and b are matrices, c is read and written, all row by row.
//   mma_f16, mma_bf16   a [16, 16], b [8, 16] of 16 bits, c [16, 8] float32: c += a b^T
//   mma_s8              a [16, 32], b [8, 32] int8, c [16, 8] int32
//   load_matrices       a [32, 8] of 16 bits: c [4, 32] registers of load_matrices, then [2, 32], then both
//   transposed
//   words               a [3, 32] of 32 bits, c [19, 32]: permutations, sums and loads by the lane, as the
//   kernel lists them
// One block of 128 threads:
//   copy_async          a [kCheckTiles, 1024] bytes through three stages of cp.async: c [1024] sums of 32-bit
//   words by place copy_bulk           the same by bulk copies and mbarriers; compute capability 9.0
// Five blocks:
//   tickets             a [1] launch number, c [2, kCheckTickets] of 64 bits: counters, and how many blocks
//   were the last to come to each
// Throws ValueError on another name.
inline constexpr int kCheckTiles = 7, kCheckTickets = 8;
struct SelfCheckArgs {
  const void* a;
  const void* b;
  void* c;
};
void self_check(const std::string& name, const SelfCheckArgs& args, int device, cudaStream_t stream);

}  // namespace pared::cuda
