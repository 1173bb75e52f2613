// What the int8 product decides on the host: plain C++, tested on machines without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch_number.h"

namespace pared::cuda {

inline constexpr int kInt8Align = 16;  // rows of int8 operands begin at multiples of it, zeros in between
inline constexpr int kInt8StepBytes = 128;  // of the reduction axis, a stage of the pipeline

// A block computes `rows` tokens by `columns` outputs. Few tokens: what counts is bytes in flight, so the
// stages are small and many blocks share a multiprocessor. Many: reuse from shared memory, which bounds the
// tile.
struct Int8Tile {
  int rows, columns, stages;
};
inline constexpr Int8Tile kInt8Tiles[] = {{16, 128, 4}, {32, 128, 4}, {64, 128, 3}, {128, 128, 3}};
inline constexpr int kInt8TileCount = 4;

// Those of sm_90's wgmma, which come after them in every list. No splits: for few tokens, where a block more
// is worth more than a faster product, the tiles above serve. `cost` is what a multiply-add of the tile
// takes, relative to the largest: a small one reads more for each.
struct Int8WgmmaTile {
  int rows, columns;
  float cost;
};
// The list, as X(rows, columns, cost): each has a function and a source of its own. PARED_CUTLASS_ONE_TILE: a
// build that shows that they compile, since nvcc takes long for each.
#ifdef PARED_CUTLASS_ONE_TILE
#define PARED_INT8_WGMMA_TILES(X) X(128, 128, 1.1f)
#else
#define PARED_INT8_WGMMA_TILES(X) X(64, 128, 1.3f) X(128, 128, 1.1f) X(128, 256, 1.0f)
#endif
#define PARED_TILE(rows, columns, cost) {rows, columns, cost},
inline constexpr Int8WgmmaTile kInt8WgmmaTiles[] = {PARED_INT8_WGMMA_TILES(PARED_TILE)};
#undef PARED_TILE
inline constexpr int kInt8WgmmaTileCount = sizeof(kInt8WgmmaTiles) / sizeof(Int8WgmmaTile);
inline constexpr int64_t kInt8WgmmaTokens = 65;  // the fewest

constexpr int64_t int8_padded(int64_t cols) { return (cols + kInt8Align - 1) / kInt8Align * kInt8Align; }

struct Int8Plan {
  int tile;  // index into kInt8Tiles; from kInt8TileCount on, into kInt8WgmmaTiles
  int64_t tiles_m, tiles_n;
  int64_t steps;   // stages along the reduction, all splits together
  int32_t splits;  // blocks that share a tile, each its own part of the steps; sums of integers have no order
  int64_t counters_bytes, workspace_bytes;  // counters first
};

// The wgmma tile whose rounds over the device take the least; -1 where tokens are too few for one. tokens,
// outputs > 0.
inline int int8_wgmma_tile(int64_t tokens, int64_t outputs, int multiprocessors) {
  if (tokens < kInt8WgmmaTokens) return -1;
  int best = -1;
  double least = 0;
  for (int i = 0; i < kInt8WgmmaTileCount; ++i) {
    const Int8WgmmaTile& t = kInt8WgmmaTiles[i];
    const int64_t tiles = ((tokens + t.rows - 1) / t.rows) * ((outputs + t.columns - 1) / t.columns);
    const int64_t rounds = (tiles + multiprocessors - 1) / multiprocessors;
    const double time = static_cast<double>(rounds) * t.rows * t.columns * t.cost;
    if (best < 0 || time < least) best = i, least = time;
  }
  return kInt8TileCount + best;
}

// The mma.sync tiles; `forced` is one of them, or -1. tokens, outputs > 0.
inline Int8Plan plan_int8(int64_t tokens, int64_t outputs, int64_t cols, int multiprocessors,
                          int forced = -1) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Int8Plan p{};
  // The smallest tile that holds all tokens, else the largest; a smaller one where the largest would leave
  // multiprocessors idle.
  while (p.tile < 3 && kInt8Tiles[p.tile].rows < tokens) ++p.tile;
  if (p.tile == 3 && up(tokens, 128) * up(outputs, 128) < multiprocessors) p.tile = 2;
  if (forced >= 0) p.tile = forced;
  const Int8Tile& tile = kInt8Tiles[p.tile];
  p.tiles_m = up(tokens, tile.rows);
  p.tiles_n = up(outputs, tile.columns);
  p.steps = up(cols, kInt8StepBytes);
  // Split where a second block a multiprocessor is missing, but leave each at least four steps: a block has
  // its pipeline to fill, and its partial sums to write.
  const int64_t tiles = p.tiles_m * p.tiles_n, wanted = int64_t{2} * multiprocessors;
  p.splits = tiles >= multiprocessors
                 ? 1
                 : static_cast<int32_t>(std::clamp<int64_t>(std::min(wanted / tiles, p.steps / 4), 1, 16));
  if (p.splits > 1) {
    p.counters_bytes = up(tiles * kTicketBytes, 16) * 16;
    p.workspace_bytes = p.counters_bytes + tiles * p.splits * tile.rows * tile.columns * 4;
  }
  return p;
}

}  // namespace pared::cuda
