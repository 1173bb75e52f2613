// What the int8 product decides on the host: plain C++, tested on machines without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

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

constexpr int64_t int8_padded(int64_t cols) { return (cols + kInt8Align - 1) / kInt8Align * kInt8Align; }

struct Int8Plan {
  int tile;  // index into kInt8Tiles
  int64_t tiles_m, tiles_n;
  int64_t steps;   // stages along the reduction, all splits together
  int32_t splits;  // blocks that share a tile, each its own part of the steps; sums of integers have no order
  int64_t counters_bytes, workspace_bytes;  // counters first, zero before the first launch
};

// tokens, outputs > 0.
inline Int8Plan plan_int8(int64_t tokens, int64_t outputs, int64_t cols, int multiprocessors) {
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Int8Plan p{};
  // The smallest tile that holds all tokens, else the largest; a smaller one where the largest would leave
  // multiprocessors idle.
  while (p.tile < 3 && kInt8Tiles[p.tile].rows < tokens) ++p.tile;
  if (p.tile == 3 && up(tokens, 128) * up(outputs, 128) < multiprocessors) p.tile = 2;
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
    p.counters_bytes = up(tiles * 4, 16) * 16;
    p.workspace_bytes = p.counters_bytes + tiles * p.splits * tile.rows * tile.columns * 4;
  }
  return p;
}

}  // namespace pared::cuda
