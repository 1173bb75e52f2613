// Two products. Few tokens: the weight is read once at the speed of memory, lanes take a row's non-zeros by
// fours and gather the activations of all tokens from shared memory. Many tokens: lanes are tokens, 256 bytes
// of them for each column of a panel in shared memory, whose loads are the limit: one of 256 bytes a
// non-zero, and one of a four's values and one of its columns, which all lanes share.
#include "core/check.h"
#include "cuda/csr.h"
#include "cuda/device.h"
#include "cuda/epilogue.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace pared::cuda {
namespace {

// Values that are loaded with one instruction, or two.
template <class V, int kCount>
struct alignas(sizeof(V) * kCount < 16 ? sizeof(V) * kCount : 16) Pack {
  V at[kCount];
};

// Two 16-bit values of a word, in float32.
template <class V>
__device__ __forceinline__ float low(unsigned two) {
  if constexpr (std::is_same<V, __half>::value)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(two & 0xffffu)));
  else return __uint_as_float(two << 16);
}
template <class V>
__device__ __forceinline__ float high(unsigned two) {
  if constexpr (std::is_same<V, __half>::value)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(two >> 16)));
  else return __uint_as_float(two & 0xffff0000u);
}

// The activations of a slot, or of a part of it: kCount at a 32-bit address in shared memory.
template <class V, int kCount>
__device__ __forceinline__ void load_activations(float (&x)[kCount], uint32_t address) {
  constexpr int kBytes = kCount * sizeof(V), kWords = kBytes < 4 ? 1 : kBytes / 4;
  uint32_t words[kWords];
  if constexpr (kBytes == 16) {
    const uint4 four = ptx::load_shared<uint4>(address);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else if constexpr (kBytes == 8) {
    const uint2 two = ptx::load_shared<uint2>(address);
    words[0] = two.x, words[1] = two.y;
  } else if constexpr (kBytes == 4) {
    words[0] = ptx::load_shared<uint32_t>(address);
  } else {
    words[0] = ptx::load_shared<uint16_t>(address);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(V) == 4) x[i] = __uint_as_float(words[i]);
    else x[i] = i % 2 ? high<V>(words[i / 2]) : low<V>(words[i / 2]);
  }
}

// Where the four entries of one four have their activations: `at`, in slots of kBytes behind slot 0 of the
// index range. A product of bytes and a sum are one instruction.
struct WideColumns {
  uint2 words;

  template <int kBytes>
  __device__ __forceinline__ void addresses(uint32_t (&at)[kCsrFour], uint32_t slot_0) const {
#pragma unroll
    for (int i = 0; i < kCsrFour; ++i) {
      const unsigned two = i < 2 ? words.x : words.y;
      if constexpr (kBytes < 256) at[i] = __dp2a_lo(two, i % 2 ? kBytes * 256u : kBytes * 1u, slot_0);
      else at[i] = slot_0 + __byte_perm(two, 0, i % 2 ? 0x4324 : 0x4104);  // times 256, which no byte holds
    }
  }
};
struct NearColumns {
  uint32_t word;

  template <int kBytes>
  __device__ __forceinline__ void addresses(uint32_t (&at)[kCsrFour], uint32_t slot_0) const {
    if constexpr (kBytes < 256) {
      static_assert(8 * kBytes < 256);
      constexpr uint32_t kOne = kBytes;
      const uint32_t steps = word & 0x1f1f0000u, last = (word >> 5) & 0x07070000u;
      at[0] = __dp2a_lo(word, kOne, slot_0);
      at[1] = __dp4a(steps, kOne << 16, at[0]);
      at[2] = __dp4a(steps, kOne << 24, at[1]);
      at[3] = __dp4a(last, kOne << 16 | kOne << 27, at[2]);
    } else {
      static_assert(kBytes == 256);
      const uint32_t twice = (word << 1) & 0x3e3e0000u, last = word & 0xe0e00000u;  // 32 times its threes
      at[0] = slot_0 + __byte_perm(word, 0, 0x4104);
      at[1] = __dp4a(twice, 128u << 16, at[0]);
      at[2] = __dp4a(twice, 128u << 24, at[1]);
      at[3] = __dp4a(last, 8u << 16 | 64u << 24, at[2]);
    }
  }
};

// Four of a row's entries, as they come from memory.
template <class V, bool kNear>
struct Entries {
  std::conditional_t<kNear, NearColumns, WideColumns> columns;
  std::conditional_t<sizeof(V) == 4, uint4, uint2> values;

  __device__ __forceinline__ float value(int i) const {
    if constexpr (sizeof(V) == 4) {
      return __uint_as_float(i == 0 ? values.x : i == 1 ? values.y : i == 2 ? values.z : values.w);
    } else {
      const unsigned two = i < 2 ? values.x : values.y;
      return i % 2 ? high<V>(two) : low<V>(two);
    }
  }
};

template <class V, bool kNear>
__device__ __forceinline__ Entries<V, kNear> load_entries(const CsrWeight& w, uint32_t four) {
  using E = Entries<V, kNear>;
  E e;
  if constexpr (kNear) e.columns.word = __ldg(static_cast<const uint32_t*>(w.columns) + four);
  else e.columns.words = __ldg(static_cast<const uint2*>(w.columns) + four);
  e.values = __ldg(static_cast<const decltype(E::values)*>(w.values) + four);
  return e;
}

template <class V>
__device__ __forceinline__ V finish(const CsrProduct& p, float sum, int64_t row) {
  return narrow<V>(activate(p.bias ? __fadd_rn(sum, __ldg(p.bias + row)) : sum, p.activation));
}

// ---- few tokens

// Memory answers after a microsecond: what saturates it is 40 KB and more that are asked for at a time on
// each multiprocessor, of which two blocks of threads share one.
constexpr int kLoadsAhead = 8;  // of activations, a thread
// Fours that a lane asks for at a time: 48 to 96 bytes. Sums of more tokens need the registers.
template <class V, int kTokens, bool kNear>
constexpr int kFoursAhead =
    sizeof(V) == 4 ? (kNear && kTokens <= 2 ? 4 : 2) : (kNear && kTokens <= 4 ? 8 : 4);

// Tokens of a slot that one load takes. The others are in a plane of their own: of slots of 32 bytes, a load
// could want only every other 16.
template <class V, int kTokens>
constexpr int kTogether = kTokens * sizeof(V) > 16 ? 16 / sizeof(V) : kTokens;

// The panel of K blocks [b0, b1): [planes][slots][kTogether], planes `plane` elements apart, zeros for tokens
// beyond and in the slots of zeros.
template <class V, int kTokens>
__device__ __forceinline__ void load_panel(V* panel, int plane, const CsrProduct& p, int64_t first_token,
                                           int b0, int b1) {
  const int block_cols = p.w.block_cols, slots = p.w.slots;
  const auto* x = static_cast<const V*>(p.x);
  using Part = Pack<V, kTogether<V, kTokens>>;
  constexpr int kAhead = kLoadsAhead / kTokens;  // blocks whose loads are under way together
  for (int k = static_cast<int>(threadIdx.x); k < slots; k += kCsrThreads)
    for (int first = b0; first < b1; first += kAhead) {
      Pack<V, kTokens> out[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t column = int64_t{first + u} * block_cols + (k - k / kCsrRun);
        const bool zeros = k % kCsrRun == kCsrReach || k == slots - 1;
        const bool real = !zeros && first + u < b1 && column < p.w.cols;
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
          out[u].at[t] = real && first_token + t < p.tokens ? x[(first_token + t) * p.x_stride + column]
                                                            : static_cast<V>(0.0f);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u)
#pragma unroll
        for (int t = 0; t < kTokens; t += kTogether<V, kTokens>)
          if (first + u < b1)
            *reinterpret_cast<Part*>(panel + t / kTogether<V, kTokens> * plane +
                                     ((first + u - b0) * slots + k) * kTogether<V, kTokens>) =
                *reinterpret_cast<const Part*>(&out[u].at[t]);
    }
}

// slot_0: where slot 0 would be in the first plane; `plane` in bytes.
template <class V, int kTokens, bool kNear>
__device__ __forceinline__ void gather(float (&sums)[kTokens], const Entries<V, kNear>& e, uint32_t slot_0,
                                       uint32_t plane) {
  constexpr int kPart = kTogether<V, kTokens>;
  uint32_t at[kCsrFour];
  e.columns.template addresses<kPart* static_cast<int>(sizeof(V))>(at, slot_0);
#pragma unroll
  for (int i = 0; i < kCsrFour; ++i) {
    const float v = e.value(i);
#pragma unroll
    for (int part = 0; part < kTokens; part += kPart) {
      float x[kPart];
      load_activations<V>(x, at[i] + static_cast<uint32_t>(part / kPart) * plane);
#pragma unroll
      for (int t = 0; t < kPart; ++t) sums[part + t] = __fmaf_rn(v, x[t], sums[part + t]);
    }
  }
}

template <class V, int kTokens, bool kNear>
__global__ void __launch_bounds__(kCsrThreads, 2) csr_gather_kernel(const CsrProduct p, const int chunk) {
  PARED_DYNAMIC_SHARED(shared);
  PARED_SHARED(float[kCsrGatherSums * kTokens], totals);
  V* panel = reinterpret_cast<V*>(shared);
  const int64_t first_token = int64_t{blockIdx.y} * kTokens;
  constexpr int kAhead = kFoursAhead<V, kTokens, kNear>;
  const int slots = p.w.slots;
  const int blocks = p.w.blocks, range = p.w.range_blocks;
  const int plane = chunk * slots * kTogether<V, kTokens>;
  int loaded = -1;
  for (int64_t at = blockIdx.x; at < p.w.item_count; at += gridDim.x) {
    const CsrItem item = p.w.items[at];
    const int parts = item.lanes > 32 ? item.lanes / 32 : 1;  // warps that share a row
    const int count = (item.end - item.begin) * parts * kTokens;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kCsrThreads) totals[i] = 0.0f;
    const int groups = kCsrThreads / item.lanes;
    const int group = static_cast<int>(threadIdx.x) / item.lanes;
    const int lane = static_cast<int>(threadIdx.x) % item.lanes;
    for (int b0 = 0; b0 < blocks;) {
      // Columns count from the start of their range.
      const int range_end = (b0 / range + 1) * range, some = b0 + chunk;
      const int end_of_both = some < range_end ? some : range_end;
      const int b1 = end_of_both < blocks ? end_of_both : blocks;
      __syncthreads();  // the panel is read, the totals are zero
      if (loaded != b0) {
        load_panel<V, kTokens>(panel, plane, p, first_token, b0, b1);
        loaded = b0;
        __syncthreads();
      }
      // Slots count from the start of the range, whose first ones the panel may not hold.
      constexpr uint32_t kSlotBytes = kTogether<V, kTokens> * sizeof(V);
      const uint32_t slot_0 =
          ptx::shared_address(panel) - static_cast<uint32_t>(b0 % range * slots) * kSlotBytes;
      const auto fours_of = [&](int row) {  // [x, y)
        if (row >= item.end) return make_uint2(0, 0);
        const uint32_t* starts = p.w.starts + int64_t{row} * blocks;
        return make_uint2(__ldg(starts + b0), __ldg(starts + b1));
      };
      uint2 fours = fours_of(item.begin + group);
      for (int first = item.begin; first < item.end; first += groups) {
        const int row = first + group;
        const uint2 next = fours_of(row + groups);  // under way while this row is added up
        float sums[kTokens] = {};
        const uint32_t end = fours.y, step = static_cast<uint32_t>(item.lanes);
        for (uint32_t e = fours.x + static_cast<uint32_t>(lane); e < end; e += kAhead * step) {
          Entries<V, kNear> entries[kAhead];
          bool inside[kAhead];
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            inside[i] = end - e > static_cast<uint32_t>(i) * step;
            if (inside[i]) entries[i] = load_entries<V, kNear>(p.w, e + static_cast<uint32_t>(i) * step);
          }
#pragma unroll
          for (int i = 0; i < kAhead; ++i)
            if (inside[i])
              gather<V, kTokens, kNear>(sums, entries[i], slot_0, static_cast<uint32_t>(plane) * sizeof(V));
        }
        fours = next;
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
          for (int d = (item.lanes < 32 ? item.lanes : 32) / 2; d > 0; d /= 2)
            sums[t] += __shfl_xor_sync(0xffffffffu, sums[t], d);
        if (row < item.end && lane % 32 == 0) {
          float* total = totals + ((row - item.begin) * parts + lane / 32) * kTokens;
#pragma unroll
          for (int t = 0; t < kTokens; ++t) total[t] += sums[t];
        }
      }
      b0 = b1;
    }
    __syncthreads();
    const int rows = item.end - item.begin;
    for (int i = static_cast<int>(threadIdx.x); i < rows * kTokens; i += kCsrThreads) {
      const int r = i % rows, t = i / rows;
      if (first_token + t >= p.tokens) continue;
      float sum = 0.0f;
      for (int part = 0; part < parts; ++part) sum += totals[(r * parts + part) * kTokens + t];
      const int64_t row = item.begin + r;
      static_cast<V*>(p.y)[(first_token + t) * p.y_stride + row] = finish<V>(p, sum, row);
    }
    __syncthreads();  // the next item's totals take their place
  }
}

// ---- many tokens

// x [tokens, cols] to panels [token tiles][cols][kTokens], zeros for tokens beyond.
inline constexpr int kTurnCols = 32, kTurnThreads = 256;

template <class V>
__global__ void __launch_bounds__(kTurnThreads) csr_turn_kernel(const CsrProduct p) {
  constexpr int kTokens = kCsrSlotBytes / sizeof(V), kPitch = kTurnCols + 1;
  PARED_SHARED(V[kTokens * kPitch], tile);
  const int64_t first_token = int64_t{blockIdx.x} * kTokens, first_col = int64_t{blockIdx.y} * kTurnCols;
  const auto* x = static_cast<const V*>(p.x);
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * kTurnCols; i += kTurnThreads) {
    const int t = i / kTurnCols, c = i % kTurnCols;
    const bool real = first_token + t < p.tokens && first_col + c < p.w.cols;
    tile[t * kPitch + c] = real ? x[(first_token + t) * p.x_stride + first_col + c] : static_cast<V>(0.0f);
  }
  __syncthreads();
  auto* out = reinterpret_cast<V*>(p.workspace) + (blockIdx.x * p.w.cols + first_col) * kTokens;
  constexpr int kPair = 4 / sizeof(V);  // four bytes a store
  for (int i = static_cast<int>(threadIdx.x); i < kTurnCols * kTokens / kPair; i += kTurnThreads) {
    const int c = i / (kTokens / kPair), t = i % (kTokens / kPair) * kPair;
    if (first_col + c >= p.w.cols) break;
    Pack<V, kPair> two;
#pragma unroll
    for (int j = 0; j < kPair; ++j) two.at[j] = tile[(t + j) * kPitch + c];
    *reinterpret_cast<Pack<V, kPair>*>(out + int64_t{c} * kTokens + t) = two;
  }
}

// Copies K block b into a stage: its columns' slots; those of zeros are the kernel's.
__device__ __forceinline__ void copy_panel(unsigned char* stage, const CsrProduct& p, int64_t tile, int b) {
  constexpr int kChunks = kCsrSlotBytes / 16;
  const int64_t first = int64_t{b} * p.w.block_cols, left = p.w.cols - first;
  const int columns = left < p.w.block_cols ? static_cast<int>(left) : p.w.block_cols;
  const unsigned char* in = p.workspace + (tile * p.w.cols + first) * kCsrSlotBytes;
  for (int i = static_cast<int>(threadIdx.x); i < columns * kChunks; i += kCsrThreads) {
    const int zeros = i / (kCsrReach * kChunks);  // slots of zeros before
    ptx::copy_async<16>(stage + (i + zeros * kChunks) * 16, in + int64_t{i} * 16);
  }
}

// kRows rows a warp, all tokens of a tile: 256 bytes of x a lane pair of words.
template <class V, int kRows, bool kNear>
__global__ void __launch_bounds__(kCsrThreads, 1) csr_panel_kernel(const CsrProduct p) {
  PARED_DYNAMIC_SHARED(shared);
  constexpr int kTokens = kCsrSlotBytes / sizeof(V), kMine = kTokens / 32;  // tokens of a tile, of a lane
  constexpr int kTile = kRows * kCsrWarps, kRowsOfGroup = kCsrGroup / kCsrWarps;
  constexpr int kPitch = kTokens + 1;
  static_assert(kRows % kRowsOfGroup == 0 && kRows <= 32);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = ptx::lane();
  const int64_t token_tile = blockIdx.x, first_row = int64_t{blockIdx.y} * kTile;
  const int slots = p.w.slots, blocks = p.w.blocks, range = p.w.range_blocks;
  const int stage_bytes = slots * kCsrSlotBytes;

  // Lane i looks after row i of the warp: which one it is, and where its blocks begin.
  int64_t row = -1;
  if (lane < kRows) {
    const int64_t at =
        first_row + lane / kRowsOfGroup * kCsrGroup + warp * kRowsOfGroup + lane % kRowsOfGroup;
    if (at < (p.w.outputs + kCsrGroup - 1) / kCsrGroup * kCsrGroup) row = __ldg(p.w.order + at);
  }
  const uint32_t* starts = p.w.starts + (row < 0 ? 0 : row * blocks);
  uint32_t begin = row < 0 ? 0 : __ldg(starts), end = row < 0 || blocks == 0 ? begin : __ldg(starts + 1);

  // The slots of zeros: the same in all blocks.
  constexpr int kSlotWords = kCsrSlotBytes / 4;
  const int runs = (slots + kCsrRun - 1) / kCsrRun;
  for (int i = static_cast<int>(threadIdx.x); i < runs * kSlotWords; i += kCsrThreads) {
    const int run_end = (i / kSlotWords + 1) * kCsrRun, slot = (run_end < slots ? run_end : slots) - 1;
    for (int stage = 0; stage < kCsrStages && stage < blocks; ++stage)
      reinterpret_cast<uint32_t*>(shared + stage * stage_bytes)[slot * kSlotWords + i % kSlotWords] = 0;
  }

  float sums[kRows][kMine] = {};
  if (blocks > 0) copy_panel(shared, p, token_tile, 0);
  ptx::copy_commit();
  for (int b = 0; b < blocks; ++b) {
    const uint32_t next = row >= 0 && b + 1 < blocks ? __ldg(starts + b + 2) : end;
    if (b + 1 < blocks) copy_panel(shared + (b + 1) % kCsrStages * stage_bytes, p, token_tile, b + 1);
    ptx::copy_commit();
    ptx::copy_wait<1>();
    __syncthreads();
    const uint32_t base = ptx::shared_address(shared) +
                          static_cast<uint32_t>((b % kCsrStages - b % range) * stage_bytes + lane * 8);
    Entries<V, kNear> ahead = load_entries<V, kNear>(p.w, __shfl_sync(0xffffffffu, begin, 0));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t e = __shfl_sync(0xffffffffu, begin, r);
      const uint32_t last = __shfl_sync(0xffffffffu, end, r);
      Entries<V, kNear> now = ahead;
      if (r + 1 < kRows) ahead = load_entries<V, kNear>(p.w, __shfl_sync(0xffffffffu, begin, r + 1));
      while (e < last) {
        Entries<V, kNear> following = now;
        if (++e < last) following = load_entries<V, kNear>(p.w, e);
        uint32_t at[kCsrFour];
        now.columns.template addresses<kCsrSlotBytes>(at, base);
#pragma unroll
        for (int i = 0; i < kCsrFour; ++i) {
          float x[kMine];
          load_activations<V>(x, at[i]);
          const float v = now.value(i);
#pragma unroll
          for (int t = 0; t < kMine; ++t) sums[r][t] = __fmaf_rn(v, x[t], sums[r][t]);
        }
        now = following;
      }
    }
    begin = end;
    end = next;
    __syncthreads();  // the stage is read; the copies after the next take its place
  }
  ptx::copy_wait<0>();

  // Through shared memory, so that a warp stores consecutive outputs. Rows lie as they do in the matrix.
  auto* staged = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int at = static_cast<int>(__shfl_sync(0xffffffffu, static_cast<int>(row - first_row), r));
    if (at >= 0) {
#pragma unroll
      for (int t = 0; t < kMine; ++t) staged[at * kPitch + t * 32 + lane] = sums[r][t];
    }
  }
  __syncthreads();
  const int64_t first_token = token_tile * kTokens;
  const int64_t left = p.w.outputs - first_row;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTokens; i += kCsrThreads) {
    const int r = i % kTile, t = i / kTile;
    if (first_token + t >= p.tokens) break;
    if (r < left)
      static_cast<V*>(p.y)[(first_token + t) * p.y_stride + first_row + r] =
          finish<V>(p, staged[r * kPitch + t % kMine * 32 + t / kMine], first_row + r);
  }
}

template <class V, bool kNear>
void launch_gather(const CsrProduct& p, const CsrPlan& plan, cudaStream_t stream) {
  PARED_CHECK(plan.token_tiles <= 65535, "x: expected at most ", int64_t{65535} * plan.tokens,
              " tokens in passes of few, got ", p.tokens);
  const LaunchPlan at{dim3(static_cast<unsigned>(plan.grid), static_cast<unsigned>(plan.token_tiles)),
                      kCsrThreads, static_cast<size_t>(plan.shared_bytes)};
  const auto run = [&](const char* name, auto kernel) {
    launch(name, kernel, at, stream, p, plan.chunk_blocks);
  };
  switch (plan.tokens) {
    case 1: return run(kNear ? "csr_gather_near_1" : "csr_gather_1", csr_gather_kernel<V, 1, kNear>);
    case 2: return run(kNear ? "csr_gather_near_2" : "csr_gather_2", csr_gather_kernel<V, 2, kNear>);
    case 4: return run(kNear ? "csr_gather_near_4" : "csr_gather_4", csr_gather_kernel<V, 4, kNear>);
    default: return run(kNear ? "csr_gather_near_8" : "csr_gather_8", csr_gather_kernel<V, 8, kNear>);
  }
}

template <class V, bool kNear>
void launch_panel(const CsrProduct& p, const CsrPlan& plan, cudaStream_t stream) {
  const int64_t across = csr_up(p.w.cols, kTurnCols);
  PARED_CHECK(across <= 65535 && plan.row_tiles <= 65535 && plan.token_tiles < (int64_t{1} << 31),
              "w: expected at most ", 65535 * kTurnCols, " inputs and ", int64_t{65535} * plan.rows,
              " outputs, got ", p.w.cols, " and ", p.w.outputs);
  const auto tiles = static_cast<unsigned>(plan.token_tiles);
  if (across)
    launch("csr_turn", csr_turn_kernel<V>, {dim3(tiles, static_cast<unsigned>(across)), kTurnThreads}, stream,
           p);
  const LaunchPlan at{dim3(tiles, static_cast<unsigned>(plan.row_tiles)), kCsrThreads,
                      static_cast<size_t>(plan.shared_bytes)};
  const auto run = [&](const char* name, auto kernel) { launch(name, kernel, at, stream, p); };
  switch (plan.rows) {
    case 64: return run(kNear ? "csr_panel_near_64" : "csr_panel_64", csr_panel_kernel<V, 4, kNear>);
    case 128: return run(kNear ? "csr_panel_near_128" : "csr_panel_128", csr_panel_kernel<V, 8, kNear>);
    default: return run(kNear ? "csr_panel_near_256" : "csr_panel_256", csr_panel_kernel<V, 16, kNear>);
  }
}

template <class V, bool kNear>
void launch_product(const CsrProduct& p, const CsrPlan& plan, cudaStream_t stream) {
  if (plan.panel) launch_panel<V, kNear>(p, plan, stream);
  else launch_gather<V, kNear>(p, plan, stream);
}
template <class V>
void launch_product(const CsrProduct& p, const CsrPlan& plan, cudaStream_t stream) {
  if (p.w.near) launch_product<V, true>(p, plan, stream);
  else launch_product<V, false>(p, plan, stream);
}

}  // namespace

void csr_product(const CsrProduct& p, const CsrPlan& plan, int device, cudaStream_t stream) {
  if (p.tokens == 0 || p.w.outputs == 0) return;
  const DeviceGuard guard(device, "csr_product");
  switch (p.w.dtype) {
    case DType::f32: return launch_product<float>(p, plan, stream);
    case DType::f16: return launch_product<__half>(p, plan, stream);
    default: return launch_product<__nv_bfloat16>(p, plan, stream);
  }
}

}  // namespace pared::cuda
