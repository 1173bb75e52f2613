#include "ops/linear.h"

#include <algorithm>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {
namespace {

// The accumulators of one pass over the reduction live in L2 beside the streaming weights: 256 KB suits
// caches of 512 KB and more. Rows beyond that are another pass, which packs the panel again (cheap: a pack is
// two operations a vector, a pass thousands of rows' multiply-adds).
constexpr int64_t kAccFloats = 64 * 1024;
// Floats of a panel, and the reach of a 16-bit offset plus one tile: no offset can leave the buffer.
constexpr size_t kPanelFloats = (kMaxOffset + 1) / sizeof(float) + kPanelMaxGroups * kPanelGroup;
// Work below this many multiply-adds is not worth a second thread (10 us to start one).
constexpr int64_t kMinWorkPerThread = 1 << 19;

struct Tile {
  int64_t first;  // position
  int32_t positions, vectors;
};

// Positions cut into tiles of nearly equal numbers of vectors: 128 tokens are 64 + 64, not 96 + 32, because
// short tiles pay the same loads of weights for less work.
std::vector<Tile> cut(int64_t positions, int max_vectors) {
  const int64_t vectors = (positions + kPanelGroup - 1) / kPanelGroup;
  const int64_t tiles = (vectors + max_vectors - 1) / max_vectors;
  std::vector<Tile> out;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t v0 = vectors * i / tiles, v1 = vectors * (i + 1) / tiles;
    out.push_back({v0 * kPanelGroup,
                   static_cast<int32_t>(std::min(positions, v1 * kPanelGroup) - v0 * kPanelGroup),
                   static_cast<int32_t>(v1 - v0)});
  }
  return out;
}

struct Run {
  const LinearArgs& args;
  const CsrPacked& w;
  csr_panel_f32::Fn* const* micro;
  panel_pack::Fn* pack;
  panel_store::Fn* store;

  // One tile against row groups [g0, g1).
  void tile(const Tile& t, int64_t g0, int64_t g1, float* panel, float* acc) const {
    const PackedHeader& h = *w.header;
    const int64_t blocks = w.blocks(), element = dtype_size(args.dtype);
    const int64_t acc_stride = t.vectors * kPanelGroup;
    const int64_t groups_per_pass = std::max<int64_t>(1, kAccFloats / (acc_stride * kCsrGroup));
    for (int64_t p0 = g0; p0 < g1; p0 += groups_per_pass) {
      const int64_t p1 = std::min(g1, p0 + groups_per_pass);
      // A weight with no columns still has an epilogue: one empty block.
      for (int64_t b = 0; b < std::max<int64_t>(blocks, 1); ++b) {
        const int64_t k0 = b * h.block_k;
        const int32_t units = static_cast<int32_t>(std::min<int64_t>(h.block_k, h.cols - k0));
        if (units > 0)
          pack({static_cast<const char*>(args.x) + (t.first * args.x_stride + k0) * element, args.x_stride,
                args.dtype, t.positions, t.vectors, units, static_cast<int32_t>(h.tile), panel});
        for (int64_t g = p0; g < p1; ++g) {
          float* group_acc = acc + (g - p0) * kCsrGroup * acc_stride;
          const int32_t rows = static_cast<int32_t>(std::min<int64_t>(kCsrGroup, h.rows - g * kCsrGroup));
          if (blocks == 0) {
            std::fill_n(group_acc, rows * acc_stride, 0.0f);
          } else {
            const uint32_t at = w.starts[g * (blocks + 1) + b];
            micro[t.vectors - 1]({w.counts + (g * blocks + b) * kCsrGroup, w.values + at, w.offsets + at, panel,
                                  group_acc, rows, b > 0});
          }
          if (b + 1 >= blocks) {
            const int64_t n0 = g * kCsrGroup;
            store({group_acc, static_cast<int32_t>(acc_stride), rows, t.positions,
                   args.bias ? args.bias + n0 : nullptr, args.activation,
                   static_cast<char*>(args.y) + (t.first * args.y_stride + n0) * element, args.y_stride,
                   args.dtype});
          }
        }
      }
    }
  }
};

}  // namespace

void linear_csr(const LinearArgs& args, const CsrPacked& w) {
  const PackedHeader& h = *w.header;
  if (args.tokens == 0 || h.rows == 0) return;
  const Isa isa = active_isa();
  const Run run{args, w, kernel_for<csr_panel_f32>(isa).fn, kernel_for<panel_pack>(isa).fn,
                kernel_for<panel_store>(isa).fn};
  const std::vector<Tile> tiles = cut(args.tokens, static_cast<int>(h.tile) / kPanelGroup);
  const int64_t groups = w.groups(), blocks = w.blocks();

  // All (tile, row group) pairs in one line, cut into equal shares of non-zeros: a thread's share is a run of
  // whole tiles with a partial one at each end. `weight(g)` is the non-zeros before group g, plus a constant
  // for each row that stands for its epilogue.
  const int64_t row_cost = 4 + blocks;
  const auto weight = [&](int64_t g) {
    return static_cast<int64_t>(g < groups ? w.starts[g * (blocks + 1)] : h.nnz) + row_cost * kCsrGroup * g;
  };
  const int64_t tile_weight = weight(groups);
  int64_t total_vectors = 0;
  for (const Tile& t : tiles) total_vectors += t.vectors;
  const int64_t total = tile_weight * total_vectors;
  const int64_t max_parts = std::max<int64_t>(1, total * kPanelGroup / kMinWorkPerThread);
  const int64_t parts = std::min<int64_t>(num_threads(), max_parts);

  // First group of a tile whose weight reaches `share` of it.
  const auto group_at = [&](int64_t share) {
    int64_t lo = 0, hi = groups;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (weight(mid) < share) lo = mid + 1;
      else hi = mid;
    }
    return lo;
  };
  parallel_for(0, parts, 1, [&](int64_t part0, int64_t part1) {
    thread_local Scratch panel_memory, acc_memory;
    float* panel = panel_memory.get<float>(kPanelFloats);
    float* acc = acc_memory.get<float>(kAccFloats + kPanelMaxGroups * kPanelGroup * kCsrGroup);
    const int64_t from = total * part0 / parts, to = total * part1 / parts;
    int64_t before = 0;
    for (const Tile& t : tiles) {
      const int64_t cost = tile_weight * t.vectors;
      const int64_t begin = std::max<int64_t>(from - before, 0), end = std::min(to - before, cost);
      before += cost;
      if (begin >= end) continue;
      const int64_t g0 = begin == 0 ? 0 : group_at(begin / t.vectors);
      const int64_t g1 = end == cost ? groups : group_at(end / t.vectors);
      if (g0 < g1) run.tile(t, g0, g1, panel, acc);
    }
  });
}

}  // namespace pared
