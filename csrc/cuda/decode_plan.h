// The layout of weights for few tokens, and what the host decides about their product: plain C++, tested on
// machines without a GPU.
//
// A weight [outputs, cols] is cut into blocks of 64 outputs by 64 columns, block rows first; what is beyond
// the matrix is zero. A block is 16 fragments of mma.m16n8k16's A operand: fragment (r, s) holds outputs
// 16 r to 16 r + 15 and four columns of each lane quarter: value j of register i of lane (g, t) is
//
//   output 16 r + g + 8 (i % 2),  column 16 t + 4 s + 2 (i / 2) + j,
//
// so that the columns of a lane are 16 consecutive ones and its activations two loads of 16 bytes. Blocks lie
// one after the other at multiples of 16 bytes, `offsets` (in 16 bytes, one more than there are blocks) says
// where:
//
//   bitmap16, bitmap8: [32 lanes][4 r] masks of 32 bits, bit 16 (s / 2) + 8 j + 4 (s % 2) + i for value j of
//     register i of fragment s; [4 r][4 s] where a fragment's non-zeros begin, uint16, in bytes behind these;
//     then the non-zeros, 2 bytes or 1, fragments r-major, in a fragment by lane, register, value; zeros up
//     to 16 bytes. Of 2 bytes each fragment is two, registers 0 and 1 and then registers 2 and 3: what 32
//     lanes want at a time then lies in about 32 words of shared memory where half of the values are there;
//   pairs16: a register's two values are stored where one of them is not zero. [32 lanes][2 r / 2] masks of
//   32
//     bits, bit 16 (r % 2) + 4 s + i for register i of fragment (r, s); [4 r][4 s] where a fragment's pairs
//     begin, as above; then the pairs, 4 bytes, in the same order; zeros up to 16 bytes;
//   dense8: [4 r][2 halves of s][32 lanes][2 s][8 values], one byte each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch_number.h"

namespace pared::cuda {

enum class DecodeFormat : uint8_t { bitmap16, bitmap8, dense8, pairs16 };
// Whether values are 16-bit floats, and not bytes with scales.
template <DecodeFormat kFormat>
inline constexpr bool kOf16Bits = kFormat == DecodeFormat::bitmap16 || kFormat == DecodeFormat::pairs16;

inline constexpr int kDecodeBlock = 64;
inline constexpr int kDecodeMaskBytes = kDecodeBlock * kDecodeBlock / 8;
inline constexpr int kDecodeStartBytes = 16 * 2;
template <int kItem>                                     // bytes of a value
inline constexpr int kDecodeParts = kItem == 2 ? 2 : 1;  // of a fragment
template <int kItem>
inline constexpr int kDecodeHeaderBytes = kDecodeMaskBytes + kDecodeParts<kItem> * kDecodeStartBytes;
inline constexpr int kDecodePairMaskBytes = kDecodeMaskBytes / 2;
inline constexpr int kDecodePairHeaderBytes = kDecodePairMaskBytes + kDecodeStartBytes;
inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeMaxStages = 4;
inline constexpr int kDecodeMaxTokens = 32;
// Of bitmap8 so few tokens go to the tensor cores as integers, each activation in so many digits of 8 bits.
inline constexpr int kDecodeDigitTokens = 2, kDecodeDigits = 3;
// Blocks of threads that share a multiprocessor where shared memory admits them; more than 16 tokens: fewer.
inline constexpr int kDecodeResident = 4, kDecodeResidentMany = 2;
inline constexpr int64_t kDecodeStaticShared = 2048;  // at most, alignment included

struct DecodePlan {
  int tokens;  // padded: 8, 16 or 32
  int64_t block_rows, block_cols;
  int32_t splits;       // blocks of threads that share a row of blocks
  int32_t stages;       // copies in flight a warp: 2 to 4
  int32_t stage_bytes;  // of one: the largest block
  int32_t digit_pitch;  // bytes between digits of one activation in shared memory; 0: it goes as a float
  int64_t shared_bytes;
  int64_t counters_bytes, workspace_bytes;  // counters first
};

// Of shared memory for a block; expansion reads a value or two words behind the last.
constexpr int64_t decode_stage_bytes(int64_t largest_block) { return (largest_block + 8 + 127) / 128 * 128; }

// 1 <= tokens <= kDecodeMaxTokens; largest_block in bytes; shared_limit: of a block of threads.
inline DecodePlan plan_decode(int64_t tokens, int64_t outputs, int64_t cols, int64_t largest_block,
                              DecodeFormat format, int multiprocessors, int64_t shared_limit) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  DecodePlan p{};
  p.tokens = tokens <= 8 ? 8 : tokens <= 16 ? 16 : 32;
  p.block_rows = up(outputs, kDecodeBlock);
  p.block_cols = up(cols, kDecodeBlock);
  p.stage_bytes = static_cast<int32_t>(decode_stage_bytes(largest_block));
  const int64_t sums = int64_t{kDecodeWarps} * kDecodeBlock * p.tokens * 4;
  int64_t digit_bytes = 0;
  const auto shared = [&](int stages) {
    return std::max<int64_t>(int64_t{stages} * kDecodeWarps * p.stage_bytes + digit_bytes, sums);
  };
  // Warps hide each other's latencies, so many resident ones come first, then deep pipelines: two stages of
  // so many warps are more than the 40 to 64 KB a multiprocessor that saturate memory.
  const int64_t wanted = p.tokens == 32 ? kDecodeResidentMany : kDecodeResident;
  const auto resident = [&](int stages) {
    return std::min(wanted, (shared_limit + 1024) / (shared(stages) + kDecodeStaticShared));
  };
  const auto deepen = [&] {
    p.stages = 2;
    for (int stages = 3; stages <= kDecodeMaxStages; ++stages)
      if (resident(stages) == resident(2)) p.stages = stages;
    p.shared_bytes = shared(p.stages);
  };
  deepen();
  // All blocks of threads are resident at once, where there are so few rows; each warp should have a few
  // blocks of the weight, or filling the pipeline is all it does.
  const int64_t places = std::max<int64_t>(1, resident(p.stages)) * multiprocessors;
  p.splits = static_cast<int32_t>(std::clamp<int64_t>(
      std::min(places / std::max<int64_t>(1, p.block_rows), p.block_cols / (2 * kDecodeWarps)), 1, 64));
  // The digits of a part's activations: three of four blocks of threads have to stay resident.
  if (format == DecodeFormat::bitmap8 && tokens <= kDecodeDigitTokens && p.block_cols > 0) {
    const int64_t columns = up(p.block_cols, p.splits) * kDecodeBlock;
    const int64_t pitch =
        columns + (columns % 128 ? 0 : 64);  // of rows of 64 bytes two together touch all banks
    digit_bytes = tokens * kDecodeDigits * pitch;
    if (4 * resident(2) >= 3 * wanted) {
      p.digit_pitch = static_cast<int32_t>(pitch);
      deepen();
    }
  }
  if (p.splits > 1) {
    p.counters_bytes = up(p.block_rows * kTicketBytes, 16) * 16;
    p.workspace_bytes = p.counters_bytes + p.block_rows * p.splits * kDecodeBlock * p.tokens * 4;
  }
  return p;
}

// Bytes for a product of any number of tokens, whose launches take kDecodeMaxTokens each and the rest: the
// rest may have the more splits, and so need more.
inline int64_t decode_workspace_bytes(int64_t tokens, int64_t outputs, int64_t cols, int64_t largest_block,
                                      DecodeFormat format, int multiprocessors, int64_t shared_limit) {
  const auto bytes = [&](int64_t some) {
    return some ? plan_decode(some, outputs, cols, largest_block, format, multiprocessors, shared_limit)
                      .workspace_bytes
                : 0;
  };
  const int64_t rest = tokens % kDecodeMaxTokens;
  return std::max(tokens > rest ? bytes(kDecodeMaxTokens) : 0, bytes(rest));
}

}  // namespace pared::cuda
