#include <functional>
#include <map>

#include "core/check.h"
#include "cuda/emulate/faults.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace pared::cuda::emulate {
namespace {

using Out = unsigned*;

__global__ void half_of_a_barrier(Out) {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers(Out) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
__global__ void left_before_the_barrier(Out) {
  if (threadIdx.x == 63) return;
  __syncthreads();
}
__global__ void missing_lane(Out out) {
  if (threadIdx.x % 32 != 5) out[threadIdx.x] = __shfl_sync(kFullWarp, threadIdx.x, 0);
}
__global__ void lane_outside_its_mask(Out out) {
  out[threadIdx.x] = __shfl_sync(0xfffffffeu, threadIdx.x, 1);
}
__global__ void reads_outside_the_mask(Out out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, threadIdx.x, 20);
}
__global__ void different_shuffles(Out out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_sync(kFullWarp, threadIdx.x, 0);
  else out[threadIdx.x] = __shfl_xor_sync(kFullWarp, threadIdx.x, 1);
}
__global__ void shared_never_written(Out out) {
  PARED_SHARED(unsigned[64], s);
  out[threadIdx.x] = s[threadIdx.x];
}
__global__ void copy_never_awaited(Out out) {
  PARED_DYNAMIC_SHARED(s);
  ptx::copy_async<4>(s + 4 * threadIdx.x, out);  // *out is 0
  ptx::copy_commit();
  out[threadIdx.x] = reinterpret_cast<unsigned*>(s)[threadIdx.x];
}
// 20 KB static and 32 KB dynamic: whether a launch asks for more than is granted, the latter alone decides.
__global__ void more_static_than_thought(Out out) {
  PARED_DYNAMIC_SHARED(s);
  PARED_SHARED(unsigned[5120], words);
  words[threadIdx.x] = s[threadIdx.x] = 1;
  out[threadIdx.x] = words[threadIdx.x];
}
__global__ void writes_behind_shared(Out) {
  PARED_DYNAMIC_SHARED(s);
  s[256 + threadIdx.x % 8] = 1;
}
// Each thread reads its neighbour's word without a barrier: right in one order of the threads and wrong in
// others.
__global__ void missing_barrier(Out out) {
  PARED_DYNAMIC_SHARED(s);
  auto* words = reinterpret_cast<unsigned*>(s);
  words[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = threadIdx.x ? words[threadIdx.x - 1] : 0;
}
__global__ void misaligned_load(Out out) {
  out[0] = ptx::load_once(reinterpret_cast<const uint4*>(out + 1)).x;
}
__global__ void bulk_copy_nobody_awaits(Out out) {
  PARED_DYNAMIC_SHARED(s);
  auto* bar = reinterpret_cast<uint64_t*>(s);
  if (threadIdx.x) return;
  ptx::mbarrier_init(bar, 1);
  ptx::mbarrier_arrive_expect(bar, 64);
  ptx::copy_bulk(s + 64, out, 64, bar);
}
__global__ void mbarrier_nobody_completes(Out) {
  PARED_SHARED(uint64_t, bar);
  if (threadIdx.x == 0) ptx::mbarrier_init(&bar, 2);
  __syncthreads();
  if (threadIdx.x == 0) ptx::mbarrier_arrive(&bar);
  ptx::mbarrier_wait(&bar, 0);
}
// Lanes of a warp that hand something on without __syncwarp: a shuffle is none.
__global__ void missing_syncwarp(Out out) {
  PARED_DYNAMIC_SHARED(s);
  auto* words = reinterpret_cast<unsigned*>(s);
  words[threadIdx.x] = threadIdx.x;
  const unsigned other = __shfl_xor_sync(kFullWarp, threadIdx.x, 1);
  out[threadIdx.x] = words[other];
}
// A stage that is filled again while lanes may still read it.
__global__ void filled_while_read(Out out) {
  PARED_DYNAMIC_SHARED(s);
  PARED_SHARED(uint64_t, bar);
  if (threadIdx.x == 0) ptx::mbarrier_init(&bar, 1);
  __syncthreads();
  const unsigned word = reinterpret_cast<unsigned*>(s)[threadIdx.x];
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(&bar, 64);
    ptx::copy_bulk(s, out, 64, &bar);
  }
  ptx::mbarrier_wait(&bar, 0);
  __syncthreads();
  out[threadIdx.x] = word;
}
// Conflicts of banks, which are no errors: the turns that an instruction takes are behind `turns_`.
__global__ void turns_8_load(Out out) {
  PARED_DYNAMIC_SHARED(s);
  for (int i = 0; i < 8; ++i) reinterpret_cast<unsigned*>(s)[i * 32 + threadIdx.x % 32] = 0;
  __syncwarp();
  out[threadIdx.x] = ptx::load_shared<unsigned>(ptx::shared_address(s) + 32 * (threadIdx.x % 32));
}
__global__ void turns_8_matrices(Out out) {
  PARED_DYNAMIC_SHARED(s);  // rows 128 bytes apart, not swizzled
  uint32_t r[4];
  ptx::load_matrices(r, s + 128 * (threadIdx.x % 8) + threadIdx.x / 8 * 16);
  out[threadIdx.x] = 0;
}
__global__ void turns_1_swizzled(Out out) {
  PARED_DYNAMIC_SHARED(s);
  uint32_t r[4];
  ptx::load_matrices(r, s + 128 * (threadIdx.x % 8) + (threadIdx.x / 8 ^ threadIdx.x % 8) * 16);
  out[threadIdx.x] = 0;
}
__global__ void turns_4_copies(Out out) {
  PARED_DYNAMIC_SHARED(s);
  ptx::copy_async<16>(s + 64 * threadIdx.x, out);
  ptx::copy_commit();
  ptx::copy_wait<0>();
}
__global__ void turns_5_counts(Out) {
  PARED_DYNAMIC_SHARED(s);  // lanes 0 to 4 want words of one bank, the others one word
  const unsigned word = threadIdx.x < 5 ? 32 * threadIdx.x : 1;
  reinterpret_cast<unsigned*>(s)[threadIdx.x] = 0;
  __syncwarp();
  ptx::count_shared(ptx::shared_address(s) + 4 * word);
}
// Plain accesses, of which only some builds know.
__global__ void turns_16_plain(Out out) {
  PARED_DYNAMIC_SHARED(s);
  auto* words = reinterpret_cast<unsigned*>(s);
  for (unsigned i = 0; i < 16; ++i) words[i * 32 + threadIdx.x] = i;
  __syncthreads();
  out[threadIdx.x] = words[16 * threadIdx.x];
}
// Threads that skip a turn of a loop meet the others again behind the next barrier.
__global__ void turns_2_diverged(Out out) {
  PARED_DYNAMIC_SHARED(s);
  auto* words = reinterpret_cast<unsigned*>(s);
  for (unsigned i = threadIdx.x % 2; i < 2; ++i) words[threadIdx.x + 32 * i] = i;
  __syncthreads();
  auto* fours = reinterpret_cast<uint4*>(s) + threadIdx.x * 2 % 32;
  const uint4 four = *fours;
  out[threadIdx.x] = four.x & 1;
}
// An operand that does not begin where the swizzle does.
__global__ void wgmma_off_the_swizzle(Out) {
  PARED_DYNAMIC_SHARED(s);
  float sums[8][4] = {};
  ptx::wgmma_f16(sums, ptx::wgmma_operand(s + 128), ptx::wgmma_operand(s));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}
// The engine's operands, written by threads.
__global__ void wgmma_without_fence(Out) {
  PARED_DYNAMIC_SHARED(s);
  for (unsigned i = threadIdx.x; i < 4096; i += 128) reinterpret_cast<unsigned*>(s)[i] = 0;
  __syncthreads();
  float sums[8][4] = {};
  ptx::wgmma_f16(sums, ptx::wgmma_operand(s), ptx::wgmma_operand(s + 8192));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
}
__global__ void bulk_copy_over_written(Out out) {
  PARED_DYNAMIC_SHARED(s);
  PARED_SHARED(uint64_t, bar);
  if (threadIdx.x) return;
  reinterpret_cast<unsigned*>(s)[3] = 1;
  ptx::mbarrier_init(&bar, 1);
  ptx::mbarrier_arrive_expect(&bar, 64);
  ptx::copy_bulk(s, out, 64, &bar);
  ptx::mbarrier_wait(&bar, 0);
}
// Block 0 gives what block 1 reads: wrong when the blocks run in another order.
__global__ void order_of_blocks(Out out) {
  if (threadIdx.x == 0) out[1 + blockIdx.x] = blockIdx.x == 0 ? 7 : out[1];
}

struct Fault {
  void (*kernel)(Out);
  LaunchPlan plan;
};
const std::map<std::string, Fault>& faults() {
  static const std::map<std::string, Fault> all = {
#define PARED_FAULT(name, ...) \
  {                            \
    #name, {                   \
      name, { __VA_ARGS__ }    \
    }                          \
  }
      PARED_FAULT(half_of_a_barrier, 1, 64),
      PARED_FAULT(two_barriers, 1, 64),
      PARED_FAULT(left_before_the_barrier, 1, 64),
      PARED_FAULT(missing_lane, 1, 64),
      PARED_FAULT(lane_outside_its_mask, 1, 64),
      PARED_FAULT(reads_outside_the_mask, 1, 64),
      PARED_FAULT(different_shuffles, 1, 64),
      PARED_FAULT(shared_never_written, 1, 64),
      PARED_FAULT(copy_never_awaited, 1, 64, 256),
      PARED_FAULT(more_static_than_thought, 1, 64, 32768),
      PARED_FAULT(writes_behind_shared, 1, 64, 256),
      PARED_FAULT(missing_barrier, 1, 64, 256),
      PARED_FAULT(misaligned_load, 1, 64),
      PARED_FAULT(bulk_copy_nobody_awaits, 1, 64, 256),
      PARED_FAULT(mbarrier_nobody_completes, 1, 64),
      PARED_FAULT(order_of_blocks, 2, 64),
      PARED_FAULT(wgmma_off_the_swizzle, 1, 128, 20480),
      PARED_FAULT(wgmma_without_fence, 1, 128, 16384),
      PARED_FAULT(bulk_copy_over_written, 1, 64, 256),
      PARED_FAULT(missing_syncwarp, 1, 32, 256),
      PARED_FAULT(filled_while_read, 1, 32, 256),
      PARED_FAULT(turns_8_load, 1, 32, 1024),
      PARED_FAULT(turns_8_matrices, 1, 32, 1024),
      PARED_FAULT(turns_1_swizzled, 1, 32, 1024),
      PARED_FAULT(turns_4_copies, 1, 32, 2048),
      PARED_FAULT(turns_5_counts, 1, 32, 1024),
      PARED_FAULT(turns_16_plain, 1, 32, 2048),
      PARED_FAULT(turns_2_diverged, 1, 32, 1024),
#undef PARED_FAULT
  };
  return all;
}

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const auto& [name, fault] : faults()) names.push_back(name);
  return names;
}

std::vector<unsigned> run_fault(const std::string& name) {
  const auto found = faults().find(name);
  PARED_CHECK(found != faults().end(), "name: expected the name of a fault, got '", name, "'");
  alignas(16) unsigned out[64] = {};
  launch(name.c_str(), found->second.kernel, found->second.plan, nullptr, out);
  return {out, out + 64};
}

}  // namespace pared::cuda::emulate
