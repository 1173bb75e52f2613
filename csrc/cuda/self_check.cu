#include "core/check.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/self_check.h"
#include "cuda/ticket.h"

namespace pared::cuda {
namespace {

// kN values of a register, in 32-bit words: `a` and `b` are rows of K values.
template <class C, int kN, void (*kMma)(C (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__device__ void mma_check(const uint32_t* a, const uint32_t* b, C* c) {
  constexpr int kWords = 8;  // a row of A or B, for both sizes of element
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  const uint32_t fa[4] = {a[g * kWords + t], a[(g + 8) * kWords + t], a[g * kWords + t + 4],
                          a[(g + 8) * kWords + t + 4]};
  const uint32_t fb[2] = {b[g * kWords + t], b[g * kWords + t + 4]};
  C fc[4];
  for (int i = 0; i < 4; ++i) fc[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  kMma(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fc[i];
}

__device__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_f16(c, a, b);
}
__device__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_bf16(c, a, b);
}
__device__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_s8(c, a, b);
}

__global__ void mma_f16_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  mma_check<float, 2, mma_f16>(a, b, c);
}
__global__ void mma_bf16_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  mma_check<float, 2, mma_bf16>(a, b, c);
}
__global__ void mma_s8_kernel(const uint32_t* a, const uint32_t* b, int32_t* c) {
  mma_check<int32_t, 4, mma_s8>(a, b, c);
}

__global__ void load_matrices_kernel(const uint4* a, uint32_t* c) {
  PARED_SHARED(uint4[32], rows);
  const int lane = ptx::lane();
  rows[lane] = a[lane];
  __syncwarp();
  uint32_t four[4], two[2];
  ptx::load_matrices(four, &rows[lane]);
  for (int i = 0; i < 4; ++i) c[i * 32 + lane] = four[i];
  ptx::load_matrices(two, &rows[lane % 16]);
  for (int i = 0; i < 2; ++i) c[(4 + i) * 32 + lane] = two[i];
  ptx::load_matrices_transposed(four, &rows[lane]);
  for (int i = 0; i < 4; ++i) c[(6 + i) * 32 + lane] = four[i];
  ptx::load_matrices_transposed(two, &rows[lane % 16]);
  for (int i = 0; i < 2; ++i) c[(10 + i) * 32 + lane] = two[i];
}

// What makes selectors, addresses and words of bytes: a row of c each.
__global__ void words_kernel(const uint32_t* in, uint32_t* c) {
  PARED_DYNAMIC_SHARED(bytes);
  const int lane = ptx::lane();
  const uint32_t x = in[lane], y = in[32 + lane], z = in[64 + lane];
  reinterpret_cast<uint32_t*>(bytes)[lane] = x;
  __syncwarp();
  const uint32_t at = ptx::shared_address(bytes) + y % 126;
  uint32_t next = at & 0x78u;  // with a word behind it
  const uint32_t first_taken = ptx::take_shared(y & 8, next), second_taken = ptx::take_shared(z & 8, next);
  const uint2 two = ptx::load_shared<uint2>(at & ~7u);
  const uint4 four = ptx::load_shared<uint4>(at & ~15u);
  const uint32_t out[] = {ptx::logic<(0xf0 & 0xcc) | 0xaa>(x, y, z),
                          ptx::logic<(0xf0 ^ 0xcc) | 0xaa>(x, y, z),
                          ptx::permute(x, y, z & 0x7777),
                          ptx::add_from_left(x, 1),
                          ptx::add_from_left(x, 16),
                          ptx::load_shared<uint8_t>(at),
                          ptx::load_shared<uint16_t>(at & ~1u),
                          __dp4a(x, y, z),
                          __dp2a_lo(x, y, z),
                          __dp2a_hi(x, y, z),
                          first_taken,
                          second_taken,
                          next - ptx::shared_address(bytes),
                          two.x,
                          two.y,
                          four.x,
                          four.y,
                          four.z,
                          four.w};
  for (uint32_t i = 0; i < sizeof(out) / sizeof(out[0]); ++i) c[32 * i + lane] = out[i];
}

constexpr int kStages = 3, kThreads = 128, kTileBytes = 1024;

// Thread t owns two words of a tile, copied by another thread, so that the barrier matters.
__device__ void add_tile(const unsigned char* tile, uint32_t (&sums)[2]) {
  const auto* words = reinterpret_cast<const uint32_t*>(tile) + (threadIdx.x ^ 64) * 2;
  for (int i = 0; i < 2; ++i) sums[i] += words[i];
}
__device__ void store_sums(uint32_t* c, const uint32_t (&sums)[2]) {
  for (int i = 0; i < 2; ++i) c[(threadIdx.x ^ 64) * 2 + i] = sums[i];
}

__global__ void copy_async_kernel(const unsigned char* a, uint32_t* c) {
  PARED_DYNAMIC_SHARED(stages);
  const auto issue = [&](int tile) {
    const int at = static_cast<int>(threadIdx.x) * 8;
    if (tile < kCheckTiles)
      ptx::copy_async<8>(stages + tile % kStages * kTileBytes + at, a + tile * kTileBytes + at);
    ptx::copy_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) issue(tile);
  uint32_t sums[2] = {};
  for (int tile = 0; tile < kCheckTiles; ++tile) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    issue(tile + kStages - 1);
    add_tile(stages + tile % kStages * kTileBytes, sums);
  }
  store_sums(c, sums);
}

__global__ void copy_bulk_kernel(const unsigned char* a, uint32_t* c) {
#if defined(PARED_CUDA_EMULATED) || __CUDA_ARCH__ >= 900
  PARED_DYNAMIC_SHARED(stages);
  PARED_SHARED(uint64_t[kStages], full);
  PARED_SHARED(uint64_t[kStages], empty);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], kThreads);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  uint32_t sums[2] = {};
  for (int tile = 0; tile < kCheckTiles + kStages - 1; ++tile) {
    if (threadIdx.x == 0 && tile < kCheckTiles) {
      const int s = tile % kStages, round = tile / kStages;
      if (round > 0) ptx::mbarrier_wait(&empty[s], (round - 1) % 2);
      ptx::mbarrier_arrive_expect(&full[s], kTileBytes);
      ptx::copy_bulk(stages + s * kTileBytes, a + tile * kTileBytes, kTileBytes, &full[s]);
    }
    const int use = tile - (kStages - 1);
    if (use < 0) continue;
    ptx::mbarrier_wait(&full[use % kStages], use / kStages % 2);
    add_tile(stages + use % kStages * kTileBytes, sums);
    ptx::mbarrier_arrive(&empty[use % kStages]);
  }
  store_sums(c, sums);
#endif
}

// Each block takes a ticket of each counter, of every other one after a look that says nothing.
__global__ void tickets_kernel(const Ticket* number, Ticket* c) {
  for (int i = 0; i < kCheckTickets; ++i) {
    const Ticket seen = threadIdx.x == 0 && i % 2 == 0 ? __ldcg(c + i) : 0;
    const bool last = last_of(c + i, seen, *number, gridDim.x, [] { __syncthreads(); });
    if (last && threadIdx.x == 0) atomicAdd(c + kCheckTickets + i, 1);
  }
}

}  // namespace

void self_check(const std::string& name, const SelfCheckArgs& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device, name.c_str());
  const auto* a = static_cast<const uint32_t*>(args.a);
  const auto* b = static_cast<const uint32_t*>(args.b);
  const auto run = [&](auto kernel, const LaunchPlan& plan, auto... arguments) {
    launch(name.c_str(), kernel, plan, stream, arguments...);
  };
  const LaunchPlan warp = {1, 32}, block = {1, kThreads, size_t{kStages} * kTileBytes};
  if (name == "mma_f16") return run(mma_f16_kernel, warp, a, b, static_cast<float*>(args.c));
  if (name == "mma_bf16") return run(mma_bf16_kernel, warp, a, b, static_cast<float*>(args.c));
  if (name == "mma_s8") return run(mma_s8_kernel, warp, a, b, static_cast<int32_t*>(args.c));
  if (name == "load_matrices")
    return run(load_matrices_kernel, warp, static_cast<const uint4*>(args.a), static_cast<uint32_t*>(args.c));
  if (name == "words") return run(words_kernel, LaunchPlan{1, 32, 128}, a, static_cast<uint32_t*>(args.c));
  if (name == "tickets")
    return run(tickets_kernel, LaunchPlan{5, 64}, static_cast<const Ticket*>(args.a),
               static_cast<Ticket*>(args.c));
  const auto* bytes = static_cast<const unsigned char*>(args.a);
  if (name == "copy_async") return run(copy_async_kernel, block, bytes, static_cast<uint32_t*>(args.c));
  if (name == "copy_bulk") return run(copy_bulk_kernel, block, bytes, static_cast<uint32_t*>(args.c));
  throw ValueError(str("name: expected the name of a check, got '", name, "'"));
}

}  // namespace pared::cuda
