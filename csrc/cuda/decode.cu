// Each warp streams its own blocks of the weight through shared memory, and expands them into the A operand
// of mma.sync: outputs are the rows, tokens (or their digits) the columns. Warps meet only at the end, to add
// up their sums.
#include "core/check.h"
#include "cuda/decode.h"
#include "cuda/device.h"
#include "cuda/epilogue.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/ticket.h"

namespace pared::cuda {
namespace {

constexpr int kThreads = kDecodeWarps * 32;
constexpr int kFragments = 4;  // of a block, down and across
constexpr int kMaxStages = kDecodeMaxStages;

// ---- from global to shared memory, a block a stage, by one warp

// Stages are filled and read in turn: begin() and commit() fill what wait() gave and next() leaves behind.
struct Ring {
  unsigned char* stages;  // of this warp
  uint64_t* arrived;      // a barrier a stage; bulk copies alone
  int bytes, count;
  bool bulk;
  int at = 0, parity = 0;  // of the stage whose turn it is

  __device__ unsigned char* stage() const { return stages + at * bytes; }

  __device__ void init() const {
    if (bulk && ptx::lane() == 0) {
      for (int s = 0; s < count; ++s) ptx::mbarrier_init(arrived + s, 1);
      ptx::fence_barrier_init();
    }
    __syncwarp();
  }

  // Fills the stage with 16 * `units` bytes. The warp has read what was in it before.
  __device__ void begin(const uint8_t* from, uint32_t units) const {
#if defined(PARED_CUDA_EMULATED) || __CUDA_ARCH__ >= 900
    if (bulk) {
      if (ptx::lane() == 0) {
        ptx::mbarrier_arrive_expect(arrived + at, static_cast<int>(units) * 16);
        ptx::copy_bulk(stage(), from, static_cast<int>(units) * 16, arrived + at);
      }
      return;
    }
#endif
    for (uint32_t u = static_cast<uint32_t>(ptx::lane()); u < units; u += 32)
      ptx::copy_async<16>(stage() + u * 16, from + int64_t{u} * 16);
  }
  // After each copy that begins or would have begun.
  __device__ void commit() const {
    if (!bulk) ptx::copy_commit();
  }
  // Waits for the stage's copy, the oldest of the `count` under way.
  __device__ void wait() const {
#if defined(PARED_CUDA_EMULATED) || __CUDA_ARCH__ >= 900
    if (bulk) {
      ptx::mbarrier_wait(arrived + at, parity);
      return;
    }
#endif
    switch (count) {
      case 4: ptx::copy_wait<3>(); break;
      case 3: ptx::copy_wait<2>(); break;
      default: ptx::copy_wait<1>();
    }
    __syncwarp();  // the other lanes' parts
  }
  __device__ void next() {
    if (++at == count) at = 0, parity ^= 1;
  }
};

// ---- pairs of values as the tensor cores take them

// Two signed bytes, in bits 0 to 7 and 16 to 23, as numbers: kByteScale<T> of them is one. Exact.
template <class T>
constexpr float kByteScale = 1.0f;
// 1024 + u has u in its lowest bits.
__device__ __forceinline__ uint32_t pair_of_bytes(uint32_t two, __half) {
  const uint32_t biased = ptx::logic<(0xf0 ^ 0xcc) | 0xaa>(two, 0x00800080u, 0x64006400u);
  return bits_of<uint32_t>(__hsub2(bits_of<__half2>(biased), bits_of<__half2>(0x64806480u)));
}
// A byte's bits are the number u * 2^-133, below 128 as above it: 2^127 u - 2 is (u - 128) / 64.
template <>
constexpr float kByteScale<__nv_bfloat16> = 64.0f;
__device__ __forceinline__ uint32_t pair_of_bytes(uint32_t two, __nv_bfloat16) {
  using Two = __nv_bfloat162;
  return bits_of<uint32_t>(
      __hfma2(bits_of<Two>(two ^ 0x00800080u), bits_of<Two>(0x7f007f00u), bits_of<Two>(0xc000c000u)));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  ptx::mma_f16(c, a, b);
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __nv_bfloat16) {
  ptx::mma_bf16(c, a, b);
}

// ---- expansion: the four fragments of row r of a block, as registers

// The inclusive sums over the lanes up to the own one, of bytes that do not carry.
__device__ __forceinline__ uint32_t scan(uint32_t v) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) v = ptx::add_from_left(v, d);
  return v;
}

// What limits these kernels is instructions, not memory, wherever an element costs more than about four: the
// integer units take two cycles for a warp's instruction, products of bytes run beside them, on the units of
// multiplication. So nothing here tests a bit: a pair of values is two loads that take what lies there, and a
// byte permutation, whose selector and whose successor's address are sums of products of the mask's bits.
template <class T, class Value>  // Value: as it is stored
struct BitmapBlock {
  static constexpr uint32_t kItem = sizeof(Value);
  static constexpr int kParts = kDecodeParts<kItem>;
  struct alignas(8 * kParts) Starts {
    uint32_t at[2 * kParts];
  };
  // Selectors of permute(first, second, .) where neither value of a pair is there (bytes that loading has
  // made zero), and what is added for the lower one, and for the upper one (the second loaded, where the
  // lower one is there as well).
  static constexpr uint32_t kNone = kItem == 2 ? 0x2222 : 0x1111, kLower = kItem == 2 ? 0x43ee : 0x03ff,
                            kUpper = kItem == 2 ? 0xee00 : 0xff00;
  uint4 masks;
  const unsigned char* stage;

  __device__ explicit BitmapBlock(const unsigned char* stage)
      : masks(reinterpret_cast<const uint4*>(stage)[ptx::lane()]), stage(stage) {}

  __device__ __forceinline__ uint32_t mask_of(int r) const {
    return r == 0 ? masks.x : r == 1 ? masks.y : r == 2 ? masks.z : masks.w;
  }

  // Where the lane's values begin in each part of each fragment of row r: addresses in shared memory.
  __device__ __forceinline__ void find(int r, uint32_t (&at)[kParts][kFragments]) const {
    // The lane's non-zeros in each part of each fragment, fragments a byte each. A nibble of the mask is the
    // lower or upper values of a fragment's four pairs.
    const uint32_t mask = mask_of(r), ones = mask - (mask >> 1 & 0x55555555u);
    uint32_t own[kParts];
    own[0] = ones & 0x33333333u;
    if constexpr (kParts == 2) own[1] = ones >> 2 & 0x33333333u;
    else own[0] += ones >> 2 & 0x33333333u;
    const uint32_t values = ptx::shared_address(stage) + kDecodeHeaderBytes<kItem>;
    const Starts starts = reinterpret_cast<const Starts*>(stage + kDecodeMaskBytes)[r];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      own[part] += own[part] >> 8;
      own[part] = (own[part] & 0x000f000fu) | (own[part] << 4 & 0x0f000f00u);
      // A scan over the lanes. Up to lane 30 no sum exceeds 248; the last lane's inclusive one may carry, and
      // loses the carry again.
      const uint32_t before = scan(own[part]) - own[part];
#pragma unroll
      for (int s = 0; s < kFragments; ++s) {
        const int n = s * kParts + part;
        at[part][s] = __dp2a_lo(starts.at[n / 2], 1u << (8 * (n % 2)), values);
        at[part][s] = __dp4a(before, kItem << (8 * s), at[part][s]);
      }
    }
  }

  __device__ __forceinline__ void expand(int r, uint32_t (&a)[kFragments][4]) const {
    const uint32_t mask = mask_of(r);
    uint32_t at[kParts][kFragments];
    find(r, at);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      // Bytes 0 and 1: lower and upper value of pair n % 4 of fragment n / 4; 2 and 3: of fragment n / 4 + 2.
      // Doubled for odd n where that saves a shift.
      const int doubled = kItem == 2 ? n % 2 : 0;
      const uint32_t bits = mask >> (n - doubled) & (0x01010101u << doubled);
      const uint32_t weights = kLower >> doubled | kUpper >> doubled << 16;
      const uint32_t unit = (kItem >> doubled) * 0x0101u;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& from = at[n % 4 * kParts / 4][n / 4 + 2 * half];
        const uint32_t first = ptx::load_shared<Value>(from), second = ptx::load_shared<Value>(from + kItem);
        const uint32_t select = half ? __dp2a_hi(weights, bits, kNone) : __dp2a_lo(weights, bits, kNone);
        a[n / 4 + 2 * half][n % 4] = pair(ptx::permute(first, second, select));
        if ((n + 1) * kParts % 4) from = __dp4a(bits, unit << (16 * half), from);
      }
    }
  }

  // As bytes, for m16n8k32: a[i] is fragments 2 i and 2 i + 1. Four bytes are selected from where they lie at
  // a time: two registers' worth, of two rows.
  __device__ __forceinline__ void expand_bytes(int r, uint32_t (&a)[kFragments / 2][4]) const {
    static_assert(kItem == 1);
    const uint32_t mask = mask_of(r);
    uint32_t at[1][kFragments];
    find(r, at);
    // Value j of four is byte p of those that lie there, p the number of values before it, or one of those
    // above, which are zero: selector 0x4444 and, for each value that is there, 0x110c << 4 j.
    constexpr uint32_t kFirst = 0x10c0110c, kSecond = 0xc0000c00;
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      uint32_t four[2][2];  // of fragments f and f + 2
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t first = mask >> (4 * f + 2 * j) & 0x01010101u,
                       second = mask >> (4 * f + 2 * j + 1) & 0x01010101u;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& from = at[0][f + 2 * half];
          const uint32_t word = from & ~3u;
          const uint32_t bytes = __funnelshift_r(ptx::load_shared<uint32_t>(word),
                                                 ptx::load_shared<uint32_t>(word + 4), 8 * from);
          const uint32_t select = half ? __dp2a_hi(kSecond, second, __dp2a_hi(kFirst, first, 0x4444u))
                                       : __dp2a_lo(kSecond, second, __dp2a_lo(kFirst, first, 0x4444u));
          four[half][j] = ptx::permute(bytes, 0, select);
          if (j == 0)
            from = __dp4a(second, 0x0101u << (16 * half), __dp4a(first, 0x0101u << (16 * half), from));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int row = 0; row < 2; ++row)
          a[half][2 * f + row] = ptx::permute(four[half][0], four[half][1], row ? 0x7632 : 0x5410);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t pair(uint32_t two) {
    if constexpr (kItem == 2) return two;
    else return pair_of_bytes(two, T{});
  }
};

// With few non-zeros most registers are empty, and what is left of the others is worth its place: a register
// is one load, or none.
template <class T>
struct PairBlock {
  uint2 masks;
  const unsigned char* stage;

  __device__ explicit PairBlock(const unsigned char* stage)
      : masks(reinterpret_cast<const uint2*>(stage)[ptx::lane()]), stage(stage) {}

  __device__ __forceinline__ void expand(int r, uint32_t (&a)[kFragments][4]) const {
    const uint32_t mask = (r < 2 ? masks.x : masks.y) >> (16 * (r % 2));
    // The lane's pairs in each fragment: of the fragments' four bits, then a byte each, fragments 0, 2, 1, 3.
    uint32_t own = mask & 0xffff;
    own -= own >> 1 & 0x5555;
    own = (own & 0x3333) + (own >> 2 & 0x3333);
    own = (own & 0x0f0f) | (own & 0xf0f0) << 12;
    const uint32_t before = scan(own) - own;  // at most 128 in a byte
    const uint2 starts = reinterpret_cast<const uint2*>(stage + kDecodePairMaskBytes)[r];
    const uint32_t pairs = ptx::shared_address(stage) + kDecodePairHeaderBytes;
#pragma unroll
    for (int s = 0; s < kFragments; ++s) {
      uint32_t at = __dp2a_lo(s / 2 ? starts.y : starts.x, 1u << (8 * (s % 2)), pairs);
      at = __dp4a(before, 4u << (8 * (s / 2 + s % 2 * 2)), at);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[s][i] = ptx::take_shared(mask & 1u << (4 * s + i), at);
    }
  }
};

template <class T>
struct DenseBlock {
  const uint4* values;  // of this lane

  __device__ explicit DenseBlock(const unsigned char* stage)
      : values(reinterpret_cast<const uint4*>(stage) + ptx::lane()) {}

  __device__ __forceinline__ void expand(int r, uint32_t (&a)[kFragments][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 loaded = values[(r * 2 + half) * 32];
      const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        a[half * 2 + i / 4][i % 4] =
            pair_of_bytes(ptx::permute(words[i / 2], 0, i % 2 ? 0x4342 : 0x4140), T{});
    }
  }
};

template <class T, DecodeFormat kFormat>
struct BlockOf {
  using type = BitmapBlock<T, uint16_t>;
};
template <class T>
struct BlockOf<T, DecodeFormat::bitmap8> {
  using type = BitmapBlock<T, uint8_t>;
};
template <class T>
struct BlockOf<T, DecodeFormat::pairs16> {
  using type = PairBlock<T>;
};
template <class T>
struct BlockOf<T, DecodeFormat::dense8> {
  using type = DenseBlock<T>;
};

// ---- the product

// The lane's 16 columns of token `token`: b[s] is the operand of fragment s.
template <class T>
__device__ __forceinline__ void load_activations(const DecodeProduct& p, int64_t token, int64_t column,
                                                 bool wide, uint32_t (&b)[kFragments][2]) {
  const auto* row = static_cast<const uint16_t*>(p.x) + token * p.x_stride + column;
  uint32_t words[8];
  if (token < p.tokens && wide && column + 16 <= p.w.cols) {
    const uint4 low = __ldg(reinterpret_cast<const uint4*>(row)),
                high = __ldg(reinterpret_cast<const uint4*>(row) + 1);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      uint32_t two = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (token < p.tokens && column + i + j < p.w.cols)
          two |= static_cast<uint32_t>(__ldg(row + i + j)) << (16 * j);
      words[i / 2] = two;
    }
  }
#pragma unroll
  for (int s = 0; s < kFragments; ++s) b[s][0] = words[2 * s], b[s][1] = words[2 * s + 1];
}

// One or two tokens of bytes: each activation is an integer of three signed digits of base 256, which are
// columns of B of their own, so that the bytes of the weight are the tensor cores' operand as they are and
// sums are exact. kMostDigits is a token's largest magnitude among the columns of a block of threads; the
// others are off by half a unit of it at most, which a sum in float32 of products as large loses in two
// steps.
constexpr float kMostDigits = 4161400.0f;
// Of a step, so that its inverse is finite.
constexpr float kLeastOfToken = 0x1p-100f;

template <class T>
__device__ __forceinline__ float element(uint32_t two, int i) {
  return static_cast<float>(bits_of<T>(static_cast<uint16_t>(two >> (16 * i))));
}

// Digits of the `columns` (a multiple of 64) activations from `first` on, [token][3][pitch], and the value of
// the lowest one's unit; NaN for a token that holds NaN or infinity. `largest`: [kDecodeDigitTokens][warps].
template <class T>
__device__ void make_digits(unsigned char* digits, float* units, uint32_t* largest, const DecodeProduct& p,
                            int pitch, int64_t first, int columns, bool wide) {
  const int tokens = static_cast<int>(p.tokens);
  uint32_t b[kFragments][2];
  for (int token = 0; token < tokens; ++token) {
    uint32_t most = 0;  // bits of magnitudes order as their values do, infinity and NaN above
    for (int c = static_cast<int>(threadIdx.x) * 16; c < columns; c += kThreads * 16) {
      load_activations<T>(p, token, first + c, wide, b);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t magnitude = b[i / 4][i / 2 % 2] >> (16 * (i % 2)) & 0x7fffu;
        most = magnitude > most ? magnitude : most;
      }
    }
    for (int d = 16; d > 0; d /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, most, d);
      most = other > most ? other : most;
    }
    if (ptx::lane() == 0) largest[token * kDecodeWarps + threadIdx.x / 32] = most;
  }
  __syncthreads();
  for (int token = 0; token < tokens; ++token) {
    uint32_t most = 0;
    for (int w = 0; w < kDecodeWarps; ++w) {
      const uint32_t other = largest[token * kDecodeWarps + w];
      most = other > most ? other : most;
    }
    const float magnitude = element<T>(most, 0),
                range = magnitude > kLeastOfToken ? magnitude : kLeastOfToken;
    const bool finite = magnitude < __uint_as_float(0x7f800000u);
    const float inverse = finite ? kMostDigits / range : 0.0f;
    if (threadIdx.x == 0) units[token] = finite ? range / kMostDigits : __uint_as_float(0x7fc00000u);
    for (int c = static_cast<int>(threadIdx.x) * 16; c < columns; c += kThreads * 16) {
      load_activations<T>(p, token, first + c, wide, b);
      uint32_t of[kDecodeDigits][4];
#pragma unroll
      for (int four = 0; four < 4; ++four) {
        // 2^23 + 0x408080 + the number: its bytes are the digits, offset by 0x80, 0x80 and 0x40.
        uint32_t q[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = finite ? element<T>(b[four][i / 2], i % 2) : 0.0f;
          q[i] = __float_as_uint(__fmaf_rn(x, inverse, 8388608.0f + 0x408080));
        }
#pragma unroll
        for (int digit = 0; digit < kDecodeDigits; ++digit) {
          const uint32_t pick = 0x40u + 0x11u * digit;
          const uint32_t bytes =
              ptx::permute(ptx::permute(q[0], q[1], pick), ptx::permute(q[2], q[3], pick), 0x5410);
          of[digit][four] = (digit == 2 ? (bytes | 0x80808080u) - 0x40404040u : bytes) ^ 0x80808080u;
        }
      }
#pragma unroll
      for (int digit = 0; digit < kDecodeDigits; ++digit) {
        const uint4 words = make_uint4(of[digit][0], of[digit][1], of[digit][2], of[digit][3]);
        *reinterpret_cast<uint4*>(digits + (token * kDecodeDigits + digit) * pitch + c) = words;
      }
    }
  }
  __syncthreads();
}

// Where the sum of a token and an output lies among those of a block row, [tokens][kDecodeBlock]: lanes of an
// mma's sums are two tokens apart, and so 16 banks of 32 by their outputs alone.
__device__ __forceinline__ int sum_at(int token, int output) {
  return token * kDecodeBlock + (output ^ (token / 2 % 4 * 8));
}

// Outputs of one block row: adds up what the blocks of threads that share it have found. False for all but
// the last of them, which has the sums of all, in the order of the splits, in `sums`.
__device__ bool reduce_splits(const DecodePlan& plan, Ticket launch, uint8_t* workspace, float* sums) {
  const int count = kDecodeBlock * plan.tokens;
  auto* counter = reinterpret_cast<Ticket*>(workspace) + blockIdx.x;
  const Ticket seen = threadIdx.x == 0 ? __ldcg(counter) : 0;
  float* of_row =
      reinterpret_cast<float*>(workspace + plan.counters_bytes) + int64_t{blockIdx.x} * plan.splits * count;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    __stcg(of_row + int64_t{blockIdx.y} * count + i, sums[i]);
  if (!last_of(counter, seen, launch, static_cast<uint32_t>(plan.splits), [] { __syncthreads(); }))
    return false;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    float sum = 0.0f;
    for (int s = 0; s < plan.splits; ++s) sum += __ldcg(of_row + int64_t{s} * count + i);
    sums[i] = sum;
  }
  __syncthreads();
  return true;
}

template <class T, DecodeFormat kFormat, int kTiles, bool kDigits>  // kTiles: of 8 tokens
__global__ void __launch_bounds__(kThreads, kTiles == 4 ? kDecodeResidentMany : kDecodeResident)
    decode_kernel(const DecodeProduct p, const DecodePlan plan, const Ticket number) {
  PARED_DYNAMIC_SHARED(shared);
  PARED_SHARED(uint64_t[kDecodeWarps * kMaxStages], barriers);
  PARED_SHARED(float[kDecodeDigitTokens], units);
  using Sum = std::conditional_t<kDigits, int32_t, float>;
  const int warp = static_cast<int>(threadIdx.x) / 32, g = ptx::lane() / 4, t = ptx::lane() % 4;
  Ring ring{shared + warp * plan.stages * plan.stage_bytes, barriers + warp * kMaxStages, plan.stage_bytes,
            plan.stages, p.bulk && ptx::kBulkCopies};
  // The warps of a block of threads take turns on its part of the row.
  const int64_t begin = plan.block_cols * blockIdx.y / plan.splits + warp,
                end = plan.block_cols * (blockIdx.y + 1) / plan.splits;
  const int mine = begin < end ? static_cast<int>((end - begin + kDecodeWarps - 1) / kDecodeWarps) : 0;
  // Of the block that is fetched next: read a turn before it is asked for.
  int64_t at = blockIdx.x * plan.block_cols + begin;
  int left = mine;
  uint32_t next_begin = 0, next_end = 0;
  const auto look_ahead = [&] {
    if constexpr (kFormat == DecodeFormat::dense8) {  // all of one size: nothing to wait for
      constexpr uint32_t kUnits = kDecodeBlock * kDecodeBlock / 16;
      next_begin = static_cast<uint32_t>(at) * kUnits;
      next_end = next_begin + kUnits;
    } else if (left > 0) {
      next_begin = __ldg(p.w.offsets + at);
      next_end = __ldg(p.w.offsets + at + 1);
    }
    at += kDecodeWarps;
  };
  const auto issue = [&] {
    if (left > 0) ring.begin(p.w.blocks + int64_t{next_begin} * 16, next_end - next_begin);
    ring.commit();
    --left;
    look_ahead();
  };
  look_ahead();
  ring.init();
  for (int i = 0; i < plan.stages; ++i) issue(), ring.next();
  ring.at = ring.parity = 0;

  const bool wide = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % 8 == 0;
  [[maybe_unused]] unsigned char* const digits = shared + kDecodeWarps * plan.stages * plan.stage_bytes;
  if constexpr (kDigits) {
    PARED_SHARED(uint32_t[kDecodeDigitTokens * kDecodeWarps], largest);
    make_digits<T>(digits, units, largest, p, plan.digit_pitch, (begin - warp) * kDecodeBlock,
                   static_cast<int>(end - (begin - warp)) * kDecodeBlock, wide);
  }
  Sum sums[kFragments][kTiles][4] = {};
  int64_t column = begin * kDecodeBlock + 16 * t;
  for (int i = 0; i < mine; ++i) {
    uint32_t b[kTiles][kFragments][2];
    if constexpr (kDigits) {
      const int at_digits = g * plan.digit_pitch + (warp + i * kDecodeWarps) * kDecodeBlock + 16 * t;
      const uint4 four = g < kDecodeDigits * p.tokens ? *reinterpret_cast<const uint4*>(digits + at_digits)
                                                      : make_uint4(0, 0, 0, 0);
      b[0][0][0] = four.x, b[0][0][1] = four.y, b[0][1][0] = four.z, b[0][1][1] = four.w;
    } else {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) load_activations<T>(p, n * 8 + g, column, wide, b[n]);
      column += kDecodeWarps * kDecodeBlock;
    }
    ring.wait();
    const typename BlockOf<T, kFormat>::type block(ring.stage());
#pragma unroll
    for (int r = 0; r < kFragments; ++r) {
      if constexpr (kDigits) {
        uint32_t a[kFragments / 2][4];
        block.expand_bytes(r, a);
#pragma unroll
        for (int s = 0; s < kFragments / 2; ++s) ptx::mma_s8(sums[r][0], a[s], b[0][s]);
      } else {
        uint32_t a[kFragments][4];
        block.expand(r, a);
#pragma unroll
        for (int s = 0; s < kFragments; ++s)
#pragma unroll
          for (int n = 0; n < kTiles; ++n) mma(sums[r][n], a[s], b[n][s], T{});
      }
    }
    __syncwarp();  // all lanes have read the stage
    issue();
    ring.next();
  }
  if (!ring.bulk) ptx::copy_wait<0>();
  __syncthreads();  // the stages are read: their memory takes the sums of each warp
  auto* found = reinterpret_cast<Sum*>(shared);
  constexpr int kCount = kDecodeBlock * kTiles * 8;
#pragma unroll
  for (int r = 0; r < kFragments; ++r)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        found[warp * kCount + sum_at(n * 8 + 2 * t + i % 2, r * 16 + g + i / 2 * 8)] = sums[r][n][i];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kThreads) {
    Sum sum = found[i];
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) sum += found[w * kCount + i];
    found[i] = sum;
  }
  __syncthreads();
  auto* staged = reinterpret_cast<float*>(shared);
  if constexpr (kDigits) {  // of an output by one thread: its sums take the place of the digits'
    for (int o = static_cast<int>(threadIdx.x); o < kDecodeBlock; o += kThreads) {
      float y[kDecodeDigitTokens] = {};
#pragma unroll
      for (int token = 0; token < kDecodeDigitTokens; ++token)
        if (token < p.tokens) {
#pragma unroll
          for (int digit = kDecodeDigits - 1; digit >= 0; --digit)
            y[token] = __fmaf_rn(y[token], 256.0f,
                                 static_cast<float>(found[sum_at(token * kDecodeDigits + digit, o)]));
          y[token] = __fmul_rn(y[token], units[token]);
        }
#pragma unroll
      for (int token = 0; token < kDecodeDigitTokens; ++token) staged[sum_at(token, o)] = y[token];
    }
    __syncthreads();
  }
  if (plan.splits > 1 && !reduce_splits(plan, number, p.workspace, staged)) return;
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kThreads) {
    const int token = i / kDecodeBlock, column = i % kDecodeBlock;
    const int64_t output = int64_t{blockIdx.x} * kDecodeBlock + column;
    if (token >= p.tokens || output >= p.w.outputs) continue;
    float y = staged[sum_at(token, column)];
    if constexpr (!kOf16Bits<kFormat> && !kDigits) y *= kByteScale<T>;
    if (p.scales) y = __fmul_rn(y, p.scales[output]);
    if (p.bias) y = __fadd_rn(y, p.bias[output]);
    static_cast<T*>(p.y)[token * p.y_stride + output] = narrow<T>(activate(y, p.activation));
  }
}

// ---- the dense weight again

template <class T, DecodeFormat kFormat>
__global__ void __launch_bounds__(32)
    expand_kernel(const DecodeWeight w, const float* scales, T* out, int64_t block_cols) {
  PARED_DYNAMIC_SHARED(shared);
  const int64_t block_row = blockIdx.x / block_cols, block_col = blockIdx.x % block_cols;
  const int lane = ptx::lane(), g = lane / 4, t = lane % 4;
  const uint32_t first = __ldg(w.offsets + blockIdx.x), units = __ldg(w.offsets + blockIdx.x + 1) - first;
  const auto* from = reinterpret_cast<const uint4*>(w.blocks) + first;
  for (uint32_t u = static_cast<uint32_t>(lane); u < units; u += 32)
    ptx::copy_async<16>(shared + u * 16, from + u);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  __syncwarp();
  const typename BlockOf<T, kFormat>::type block(shared);
  const int64_t column = block_col * kDecodeBlock + 16 * t;
  const bool wide = w.cols % 8 == 0 && column + 16 <= w.cols && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll
  for (int r = 0; r < kFragments; ++r) {
    uint32_t a[kFragments][4];
    block.expand(r, a);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t output = block_row * kDecodeBlock + 16 * r + g + 8 * half;
      if (output >= w.outputs) continue;
      alignas(16) T row[16];
#pragma unroll
      for (int c = 0; c < 16; ++c) {
        const auto bits = static_cast<uint16_t>(a[c / 4][half + c / 2 % 2 * 2] >> (c % 2 * 16));
        memcpy(row + c, &bits, 2);
        auto value = static_cast<float>(row[c]);
        if constexpr (!kOf16Bits<kFormat>) value *= kByteScale<T>;
        if (scales) value = __fmul_rn(value, scales[output]);
        if (scales || !kOf16Bits<kFormat>) row[c] = narrow<T>(value);
      }
      T* const to = out + output * w.cols + column;
      if (wide) {
#pragma unroll
        for (int i = 0; i < 2; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(row)[i];
      } else {
#pragma unroll
        for (int c = 0; c < 16; ++c)
          if (column + c < w.cols) to[c] = row[c];
      }
    }
  }
}

template <class T, DecodeFormat kFormat>
void launch_decode(const DecodeProduct& p, const DecodePlan& plan, cudaStream_t stream, const char* name) {
  const LaunchPlan at{dim3(static_cast<unsigned>(plan.block_rows), static_cast<unsigned>(plan.splits)),
                      kThreads, static_cast<size_t>(plan.shared_bytes)};
  const auto start = [&](auto kernel) { launch(name, kernel, at, stream, p, plan, launch_number()); };
  if constexpr (kFormat == DecodeFormat::bitmap8)
    if (plan.digit_pitch) return start(decode_kernel<T, kFormat, 1, true>);
  switch (plan.tokens) {
    case 8: return start(decode_kernel<T, kFormat, 1, false>);
    case 16: return start(decode_kernel<T, kFormat, 2, false>);
    default: return start(decode_kernel<T, kFormat, 4, false>);
  }
}

template <class T>
void launch_decode(const DecodeProduct& p, const DecodePlan& plan, cudaStream_t stream) {
  switch (p.w.format) {
    case DecodeFormat::bitmap16:
      return launch_decode<T, DecodeFormat::bitmap16>(p, plan, stream, "decode_bitmap16");
    case DecodeFormat::pairs16:
      return launch_decode<T, DecodeFormat::pairs16>(p, plan, stream, "decode_pairs16");
    case DecodeFormat::bitmap8:
      return launch_decode<T, DecodeFormat::bitmap8>(
          p, plan, stream, plan.digit_pitch ? "decode_bitmap8_digits" : "decode_bitmap8");
    default: return launch_decode<T, DecodeFormat::dense8>(p, plan, stream, "decode_dense8");
  }
}

template <class T>
void launch_expand(const DecodeWeight& w, const float* scales, void* out, unsigned blocks, int64_t block_cols,
                   cudaStream_t stream) {
  T* y = static_cast<T*>(out);
  const LaunchPlan at{blocks, 32, static_cast<size_t>(decode_stage_bytes(w.largest_block))};
  switch (w.format) {
    case DecodeFormat::bitmap16:
      return launch("expand_bitmap16", expand_kernel<T, DecodeFormat::bitmap16>, at, stream, w, scales, y,
                    block_cols);
    case DecodeFormat::pairs16:
      return launch("expand_pairs16", expand_kernel<T, DecodeFormat::pairs16>, at, stream, w, scales, y,
                    block_cols);
    case DecodeFormat::bitmap8:
      return launch("expand_bitmap8", expand_kernel<T, DecodeFormat::bitmap8>, at, stream, w, scales, y,
                    block_cols);
    default:
      return launch("expand_dense8", expand_kernel<T, DecodeFormat::dense8>, at, stream, w, scales, y,
                    block_cols);
  }
}

}  // namespace

void decode_product(const DecodeProduct& p, int device, cudaStream_t stream) {
  if (p.tokens == 0 || p.w.outputs == 0) return;
  const DeviceGuard guard(device, "decode_product");
  for (int64_t first = 0; first < p.tokens; first += kDecodeMaxTokens) {
    DecodeProduct some = p;
    some.tokens = std::min<int64_t>(kDecodeMaxTokens, p.tokens - first);
    some.x = static_cast<const uint16_t*>(p.x) + first * p.x_stride;
    some.y = static_cast<uint16_t*>(p.y) + first * p.y_stride;
    const DecodePlan plan = plan_decode(some.tokens, p.w.outputs, p.w.cols, p.w.largest_block, p.w.format,
                                        multiprocessors(device), shared_limit(device));
    if (p.w.dtype == DType::f16) launch_decode<__half>(some, plan, stream);
    else launch_decode<__nv_bfloat16>(some, plan, stream);
  }
}

void decode_expand(const DecodeWeight& w, const float* scales, void* out, int device, cudaStream_t stream) {
  const int64_t rows = (w.outputs + kDecodeBlock - 1) / kDecodeBlock,
                cols = (w.cols + kDecodeBlock - 1) / kDecodeBlock;
  if (rows * cols == 0) return;
  const DeviceGuard guard(device, "decode_expand");
  const auto blocks = static_cast<unsigned>(rows * cols);
  if (w.dtype == DType::f16) return launch_expand<__half>(w, scales, out, blocks, cols, stream);
  launch_expand<__nv_bfloat16>(w, scales, out, blocks, cols, stream);
}

}  // namespace pared::cuda
