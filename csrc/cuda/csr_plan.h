// The layout of unstructured sparse weights on a device, and what the host decides about their product: plain
// C++, tested on machines without a GPU.
//
// The reduction is cut into blocks of `block_cols` columns, so that a panel of activations, a block's columns
// by some tokens, fits into shared memory. A panel has a slot for each column, and slots that hold zeros: one
// behind every 31 columns, one behind the last. A row is stored block by block, the entries of a block in
// fours, filled up with zeros that point to a slot of zeros (so that padding never meets an activation, which
// may be infinite):
//
//   starts[row * blocks + b], in fours: where block b of a row begins; the next one is its end;
//   values [fours][4];
//   columns, in one of two ways, as slots within an index range: kCsrIndexSlots of them, from a block on.
//     wide: [fours][4] uint16, slots in any order; one in which value j of eight consecutive fours asks for
//       eight different slots modulo 8 has fewest bank conflicts.
//     near: [fours] uint32. Bits 0-15: the slot of the first of four. Each of the others is so many slots
//       behind the one before: up to kCsrReach in bits 16-20 and 24-28, up to kCsrLastReach in bits 21-23
//       (its low three) and 29-31. A slot of zeros is never beyond reach, so that a four may end early.
//
// One more four of zeros lies behind the last, so that kernels may load ahead.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pared::cuda {

inline constexpr int kCsrFour = 4;
inline constexpr int kCsrIndexSlots = 65536;
inline constexpr int kCsrReach = 31, kCsrLastReach = 63;
inline constexpr int kCsrRun = kCsrReach + 1;  // slots, of which the last holds zeros
inline constexpr int kCsrMostSlots = 512;      // of a panel
inline constexpr int kCsrSlotBytes = 256;      // of a panel of many tokens
inline constexpr int kCsrStages = 2;           // panels of many tokens in shared memory
inline constexpr int kCsrGroup = 64;           // rows whose order within the panel product balances its warps
inline constexpr int kCsrThreads = 512, kCsrWarps = kCsrThreads / 32;
inline constexpr int kCsrGatherTokens = 8;   // at most, of one pass
inline constexpr int kCsrGatherSums = 128;   // of an item: rows times warps that share one
inline constexpr int64_t kCsrStatic = 5120;  // bytes of static shared memory at most, and what CUDA reserves

constexpr int64_t csr_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Slots of a panel of so many columns.
constexpr int csr_slots(int block_cols) {
  return static_cast<int>(block_cols + csr_up(block_cols, kCsrReach));
}
// Columns of a block, so that two panels of many tokens fit.
inline int csr_block_cols(int64_t cols, int64_t shared_limit) {
  const int64_t slots =
      std::min<int64_t>((shared_limit - kCsrStatic) / (kCsrStages * kCsrSlotBytes), kCsrMostSlots);
  return static_cast<int>(std::max<int64_t>(1, std::min(slots - csr_up(slots, kCsrRun), cols)));
}
constexpr int64_t csr_blocks(int64_t cols, int block_cols) { return csr_up(cols, block_cols); }
constexpr int csr_index_blocks(int block_cols) { return kCsrIndexSlots / csr_slots(block_cols); }

struct CsrPlan {
  bool panel;  // lanes over tokens; else lanes over non-zeros
  int tokens;  // of a tile
  int rows;    // of a tile of the panel product
  int64_t token_tiles, row_tiles;
  int chunk_blocks;  // of the other product: blocks whose activations are in shared memory at a time
  int grid;          // its blocks of threads a tile of tokens
  int64_t shared_bytes, workspace_bytes;
};

// item_bytes: of a value. items: of the product of few tokens. few: at most so many tokens go to it; below 0
// the choice is by size.
inline CsrPlan plan_csr_product(int64_t tokens, int64_t outputs, int64_t cols, int block_cols, int item_bytes,
                                int64_t items, int multiprocessors, int64_t shared_limit, int64_t few = -1) {
  CsrPlan p{};
  const int64_t room = shared_limit - kCsrStatic, blocks = csr_blocks(cols, block_cols);
  const int panel_tokens = kCsrSlotBytes / item_bytes;
  // Few tokens: all multiprocessors have work however few rows there are, and a weight is read again for
  // each eight tokens. Many: a loaded weight serves a panel's tokens, but tiles have to be enough.
  if (few < 0) {
    const int64_t tiles = csr_up(tokens, panel_tokens) * csr_up(outputs, kCsrGroup);
    few = 2 * tiles < multiprocessors ? 4 * kCsrGatherTokens : 2 * kCsrGatherTokens;
  }
  p.panel = tokens > few;
  if (!p.panel) {
    p.tokens = 1;
    while (p.tokens < tokens && p.tokens < kCsrGatherTokens) p.tokens *= 2;
    p.token_tiles = csr_up(tokens, p.tokens);
    const int64_t slot = int64_t{p.tokens} * item_bytes, block = csr_slots(block_cols) * slot;
    // Two blocks of threads a multiprocessor, where one K block at least fits then.
    const int64_t half = (shared_limit - 1024) / 2 - kCsrStatic;
    p.chunk_blocks = static_cast<int>(std::clamp<int64_t>(half / block, 1, std::max<int64_t>(1, blocks)));
    p.shared_bytes = p.chunk_blocks * block;
    p.grid = static_cast<int>(std::clamp<int64_t>(csr_up(int64_t{2} * multiprocessors, p.token_tiles), 1,
                                                  std::max<int64_t>(1, items)));
    return p;
  }
  p.tokens = panel_tokens;
  p.token_tiles = csr_up(tokens, p.tokens);
  // The more rows share a panel, the less of the L2's bandwidth it takes; but every multiprocessor needs a
  // tile.
  for (p.rows = 256; p.rows > kCsrGroup; p.rows /= 2) {
    const bool fits = int64_t{p.rows} * (p.tokens + 1) * 4 <= room;
    if (fits && p.token_tiles * csr_up(outputs, p.rows) >= multiprocessors) break;
  }
  p.row_tiles = csr_up(outputs, p.rows);
  const int64_t stages = std::min<int64_t>(kCsrStages, std::max<int64_t>(1, blocks));
  p.shared_bytes =
      std::max<int64_t>(stages * csr_slots(block_cols) * kCsrSlotBytes, int64_t{p.rows} * (p.tokens + 1) * 4);
  p.workspace_bytes = p.token_tiles * cols * kCsrSlotBytes;
  return p;
}

}  // namespace pared::cuda
