// The loop nest around the sparse panel micro-kernel, shared by every operation that is "sparse rows times a
// panel": only how a panel block is filled and where a finished tile goes differ, and they are arguments.
//
//   for each thread's share of (tile of positions, row group):
//     for each pass of row groups whose accumulators fit L2:
//       for each K block that has non-zeros:  pack the block into L1, multiply every row group of the pass
//         (after the last block: store the row group's tile while it is in L1)
//
// Packing inside the row pass, not once ahead: a packed block is used at once from L1 and never written to
// memory; a second pass over the same tile packs again, which costs two operations a vector against the
// hundreds of rows' multiply-adds of a pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/aligned.h"
#include "core/parallel.h"
#include "formats/panel.h"
#include "kernels/registry.h"

namespace pared {

// Consecutive output positions that are computed together.
struct PanelTile {
  int64_t first;
  int32_t positions;  // real ones; vectors * kPanelGroup with the padding
  int32_t vectors;
};

template <class T>
using PanelKernel = void(const PanelArgs<T>&);

// Tiles, and where the units of their panels lie.
struct PanelTiles {
  std::vector<PanelTile> tiles;
  int64_t unit_stride = 0;  // elements between units
  bool in_place = false;    // the panels are the caller's memory, which ends with the last unit
  // `store` reads real positions alone: sums of those that fill up a tile may be anything.
  bool real_alone = false;
  // Row groups that a call of `store` takes.
  int32_t store_groups = 1;
  // Where the taps of a channel lie in a panel, in vectors, for weights whose code tells taps apart. Empty:
  // one after the other, as units do.
  int32_t channel_lines = 0;
  std::vector<uint16_t> tap_lines;  // [256], zero from the last tap on
};

// Whether offsets scale to units this far apart without a remainder.
inline bool takes_stride(const PackedHeader& w, int64_t unit_stride) {
  return (unit_stride << 16) % w.tile == 0;
}

// The positions of each image cut into tiles for `w`, of nearly equal numbers of vectors: 128 positions are
// 64 + 64, not 96 + 32, because a short tile pays the same loads of weights for less work. For the same
// reason 65 are one of 80 where a full one has 64: two would take up to 1.57 times as long as 64 positions.
//
// The panel is as wide as the widest tile: in one of full stride narrower tiles would leave sets of the L1
// cache unused. Two to seven vectors instead of eight run up to 1.07 times as fast so, 7x7 images and 16
// tokens 1.2 to 1.4.
PanelTiles cut_panel_tiles(const PackedHeader& w, int64_t positions, int64_t images = 1);

// The tiles of a product that is stored position by position, rows of the weight side by side, as a linear
// layer's is. Such a store takes several row groups: 256 or 512 consecutive bytes a position. 3072 outputs of
// 128 tokens, 64 bytes at a time, 12 KB apart, all fall into the same set of L1, each in a page of its own:
// 185 to 217 us on Zen 5, 256 bytes at a time 50, 512 at a time 33.
PanelTiles cut_row_tiles(const PackedHeader& w, int64_t positions);
inline int32_t groups_a_store(int64_t unit_stride) { return unit_stride > 64 ? 4 : 8; }  // 32 KB of sums

// Fills tap_lines for panels whose units lie one after the other.
void place_taps_in_order(const UnitCode& code, PanelTiles& panels);

namespace panel_product_detail {

// Accumulators of one pass: 256 KB suits second-level caches of 512 KB and more.
inline constexpr int64_t kAccElements = 64 * 1024;
// With room for one group more than fits.
inline constexpr int64_t kPassElements = kAccElements + kPanelMaxGroups * kPanelGroup * kCsrGroup;
// A panel, the reach of any 16-bit offset, and of any place of a tap, plus one tile: no offset can leave the
// buffer.
inline constexpr int32_t kLastLine = kMaxOffset / kLineStep;
inline constexpr size_t kPanelElements =
    static_cast<size_t>(kLastLine + 1) * kPanelGroup + kPanelMaxGroups * kPanelGroup;
static_assert(kPanelElements >= (kMaxOffset + 1) / 4 + kPanelMaxGroups * kPanelGroup);
// Below this many multiply-adds a second thread does not pay. 384 x 384, 128 tokens, 90 % zeros in 8-bit
// blocks: two take 18 us, one 32 (Zen 4); with half of that two would take 1.1 times as long as one.
inline constexpr int64_t kMinWorkPerThread = 5 << 16;
// Bytes of a weight that a second-level cache holds.
inline constexpr uint64_t kCachedWeight = 1 << 20;

// Row groups weighed by their multiply-adds, with a constant a row for its epilogue and loop ends.
template <class T>
class GroupWeights {
 public:
  explicit GroupWeights(const PanelPacked<T>& w) : w_(w), groups_(w.groups()), stride_(w.blocks() + 1) {}
  // Weight of the groups before g.
  int64_t before(int64_t g) const {
    const int64_t entries = g < groups_ ? static_cast<int64_t>(w_.starts[g * stride_]) : w_.header->entries;
    return entries * w_.header->entry_rows + (3 + stride_) * kCsrGroup * g;
  }
  int64_t total() const { return before(groups_); }
  // The group whose weight before it is nearest to `weight`. The next one that reaches it would give half of
  // sixteen random groups nine to seven.
  int64_t at(int64_t weight) const {
    int64_t lo = 0, hi = groups_;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (before(mid) < weight) lo = mid + 1;
      else hi = mid;
    }
    return lo > 0 && weight - before(lo - 1) < before(lo) - weight ? lo - 1 : lo;
  }

 private:
  const PanelPacked<T>& w_;
  int64_t groups_, stride_;
};

// Throws when the entries of a row group's K block do not lie inside the buffer. With offsets that cannot
// leave the panel, this is what makes a corrupt buffer harmless: wrong numbers at worst. One comparison,
// except for the last entries of the buffer.
template <class T>
void check_entries(const PanelPacked<T>& w, uint32_t start, const PanelRun* runs) {
  const int64_t room = w.header->entries - start;
  if (room >= w.slots() * int64_t{UINT8_MAX}) return;
  int64_t sum = 0;
  for (int s = 0; s < w.slots(); ++s) sum += runs[s].count;
  check_inside(sum <= room);
}

// The same for an offset behind the `units` units of the K block. After check_entries.
template <class T>
void check_offsets(const PanelPacked<T>& w, uint32_t start, const PanelRun* runs, int64_t units) {
  const uint16_t* end = w.offsets + start;
  for (int s = 0; s < w.slots(); ++s) end += runs[s].count;
  uint16_t largest = 0;
  for (const uint16_t* o = w.offsets + start; o < end; ++o) largest = std::max(largest, *o);
  PARED_CHECK(largest <= (units - 1) * w.code.pitch,
              "packed weight: expected offsets inside the K block, got a corrupt one");
}

// A weight's K blocks; one without columns has one, with nothing in it.
template <class T>
int64_t panel_blocks(const PanelPacked<T>& w) {
  return std::max<int64_t>(w.blocks(), 1);
}

// Row groups whose sums for a tile stay in the second-level cache.
inline int64_t groups_per_pass(const PanelTile& t) {
  return std::max<int64_t>(1, kAccElements / (t.vectors * kPanelGroup * kCsrGroup));
}

// The product of one weight's row groups with the panels of a tile, K block by K block.
template <class T>
class GroupProduct {
 public:
  GroupProduct(const PanelPacked<T>& w, PanelKernel<T>* const* micro, const PanelTiles& panels,
               const PanelTile& t)
      : w_(w),
        panels_(panels),
        kernel_(micro[t.vectors - 1]),
        // Offsets are those of a panel whose units are w.tile apart.
        scale_(w.code.taps ? (uint64_t{kPanelGroup * sizeof(T)} << 16) / kLineStep
                           : (static_cast<uint64_t>(panels.unit_stride) << 16) / w.header->tile),
        place_(w.code.taps ? kernel_for<conv_places>(active_isa()).fn : nullptr),
        blocks_(w.blocks()),
        acc_stride_(t.vectors * kPanelGroup),
        spare_(panels.real_alone ? acc_stride_ - t.positions : 0) {}

  bool has_entries(int64_t g, int64_t b) const { return b < blocks_ && starts(g)[b + 1] > starts(g)[b]; }
  int32_t rows(int64_t g) const {
    return static_cast<int32_t>(std::min<int64_t>(kCsrGroup, w_.header->rows - g * kCsrGroup));
  }

  // Adds block b of group g, which has entries, times its panel `x` to the sums, or sets them to it where it
  // is the group's first. The same block of group g + 1 comes next if `more`.
  void operator()(int64_t g, int64_t b, const T* x, T* acc, bool more) {
    const PackedHeader& h = *w_.header;
    const uint32_t* start = starts(g);
    const PanelRun* runs = w_.runs + (g * blocks_ + b) * w_.slots();
    check_entries(w_, start[b], runs);
    if (panels_.in_place && b * h.block_k + (kMaxOffset + 1) / (h.tile * 4) + 1 > w_.units)
      check_offsets(w_, start[b], runs, w_.units - b * h.block_k);
    const uint16_t* offsets = w_.offsets + start[b];
    if (place_) {
      int32_t count = 0;
      for (int s = 0; s < w_.slots(); ++s) count += runs[s].count;
      place_({offsets, count, w_.code.taps, panels_.tap_lines.data(), panels_.channel_lines, kLastLine,
              places_});
      offsets = places_;
    }
    const uintptr_t ahead = more ? start[b + blocks_ + 1] - uintptr_t{start[b]} : 0;
    const uintptr_t from_places =
        reinterpret_cast<uintptr_t>(w_.offsets + start[b]) - reinterpret_cast<uintptr_t>(offsets);
    kernel_({runs, w_.values + static_cast<int64_t>(start[b]) * h.entry_rows, offsets, x, acc,
             (rows(g) + h.entry_rows - 1) / h.entry_rows, start[b] > start[0], scale_,
             ahead * sizeof(T) * h.entry_rows, ahead * sizeof(uint16_t) + from_places, spare_});
  }

  // After the last block: rows of a group without any entry have had no sum.
  void finish(int64_t g, T* acc) const {
    if (starts(g)[blocks_] == starts(g)[0]) std::fill_n(acc, int64_t{rows(g)} * acc_stride_, T{0});
  }

 private:
  const uint32_t* starts(int64_t g) const { return w_.starts + g * (blocks_ + 1); }

  const PanelPacked<T>& w_;
  const PanelTiles& panels_;
  PanelKernel<T>* const kernel_;
  const uint64_t scale_;
  conv_places::Fn* const place_;
  const int64_t blocks_;
  const int32_t acc_stride_;
  const int32_t spare_;
  alignas(64) uint16_t places_[kCsrGroup * (UINT8_MAX + 1) + kLineStep];
};

// K blocks [b0, b1) of row groups [g0, g1). With the last block, `store` takes the sums; before, and where
// one pass takes all groups, they stay where they are: group g's at acc[(g - g0) * kCsrGroup][positions].
template <class T, class Pack, class Store>
void run_tile(const PanelPacked<T>& w, PanelKernel<T>* const* micro, const PanelTile& t,
              const PanelTiles& panels, int64_t g0, int64_t g1, int64_t b0, int64_t b1, const Pack& pack,
              const Store& store, T* panel, T* acc) {
  const PackedHeader& h = *w.header;
  GroupProduct<T> multiply(w, micro, panels, t);
  const int64_t last = panel_blocks(w) - 1, pass = groups_per_pass(t);
  const int32_t acc_stride = t.vectors * kPanelGroup;
  for (int64_t p0 = g0; p0 < g1; p0 += pass) {
    const int64_t p1 = std::min(g1, p0 + pass);
    for (int64_t b = b0; b < b1; ++b) {
      const T* x = nullptr;
      for (int64_t g = p0; g < p1; ++g) {
        T* group_acc = acc + (g - p0) * kCsrGroup * acc_stride;
        if (multiply.has_entries(g, b)) {
          if (!x) {
            const int64_t k0 = b * h.block_k;
            x = pack(t, k0, static_cast<int32_t>(std::min<int64_t>(h.block_k, w.units - k0)),
                     static_cast<int32_t>(panels.unit_stride), panel);
          }
          multiply(g, b, x, group_acc, g + 1 < p1);
        }
        if (b < last) continue;
        multiply.finish(g, group_acc);
        if ((g + 1 - p0) % panels.store_groups == 0 || g + 1 == p1) {
          const int64_t first = (g - p0) / panels.store_groups * panels.store_groups;
          store(t, (p0 + first) * kCsrGroup,
                static_cast<int32_t>((g - p0 - first) * kCsrGroup) + multiply.rows(g),
                acc + first * kCsrGroup * acc_stride, acc_stride);
        }
      }
    }
  }
}

}  // namespace panel_product_detail

// Runs the products of one or more weights with the panel columns of `panels` on the calling thread's pool.
// Weights together have equal units, tile, entry_rows and code.
//   micro: the kernels for 1 to kPanelMaxGroups vectors, for the weights' entry_rows;
//   begin(tile): called in each thread before its share of a tile;
//   pack(tile, k0, units, stride, panel): write units [k0, k0 + units) of the reduction for the tile's
//     positions to panel[(k - k0) * stride + position], and zero up to tile.vectors * kPanelGroup; returns
//     `panel`, or where the same already lies: 64-byte aligned, and readable for kPanelElements unless
//     panels.in_place says that the memory ends with the last unit of the reduction;
//   store(i, tile, row0, rows, acc, acc_stride): take the finished acc[rows][tile.positions] of weight i,
//     whose memory is its own then. Called once for each tile and panels.store_groups row groups or fewer,
//     from several threads at once.
template <class T, class Begin, class Pack, class Store>
void panel_products(const PanelPacked<T>* w, int64_t count, PanelKernel<T>* const* micro,
                    const PanelTiles& panels, const Begin& begin, const Pack& pack, const Store& store) {
  namespace detail = panel_product_detail;
  if (w[0].code.taps && panels.tap_lines.empty()) {
    PanelTiles placed = panels;
    place_taps_in_order(w[0].code, placed);
    return panel_products(w, count, micro, placed, begin, pack, store);
  }
  std::vector<detail::GroupWeights<T>> weights(w, w + count);
  int64_t all_weights = 0;
  uint64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    all_weights += weights[i].total();
    bytes += w[i].header->bytes;
  }
  const std::vector<PanelTile>& tiles = panels.tiles;
  if (tiles.empty() || all_weights == 0) return;
  const PackedHeader& h = *w[0].header;

  // All (tile, weight, row group) triples in one line, cut into equal shares of work: a thread's share is a
  // run of whole tiles with a partial one at each end. Balanced for any number of tiles, even for one.
  //
  // With two tiles it can pay that every thread takes its rows of both instead, and so reads its part of the
  // weight alone, the second time from a nearer cache. Where the tiles are of unequal width one thread would
  // pack both anyway (129 tokens, CSR at 50 %: 405 instead of 454 us); quads, whose multiply-adds wait less
  // for packing, gain 5 to 20 % once the weight exceeds L2. Other rows lose 5 % to packing twice.
  int64_t total_vectors = 0;
  for (const PanelTile& t : tiles) total_vectors += t.vectors;
  const int64_t total = all_weights * total_vectors;
  const int64_t useful_threads = std::max<int64_t>(1, total * kPanelGroup / detail::kMinWorkPerThread);
  const int64_t parts = std::min<int64_t>(num_threads(), useful_threads);
  const bool large = h.entry_rows == kQuadRows && bytes > detail::kCachedWeight;
  const bool by_rows = tiles.size() == 2 && (large || tiles[0].vectors != tiles[1].vectors);

  parallel_for(0, parts, 1, [&](int64_t part0, int64_t part1) {
    thread_local Scratch panel_memory, acc_memory;
    T* panel = panel_memory.get<T>(detail::kPanelElements);
    T* acc = acc_memory.get<T>(detail::kPassElements);
    const int64_t from = total * part0 / parts, to = total * part1 / parts;
    int64_t before = 0;
    for (const PanelTile& t : tiles) {
      const int64_t cost = all_weights * t.vectors;
      const int64_t tile_first = by_rows ? cost * part0 / parts : std::max<int64_t>(from - before, 0);
      const int64_t tile_end = by_rows ? cost * part1 / parts : std::min(to - before, cost);
      before += cost;
      bool begun = false;
      int64_t passed = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t own = weights[i].total() * t.vectors;
        const int64_t first = std::max<int64_t>(tile_first - passed, 0),
                      end = std::min(tile_end - passed, own);
        passed += own;
        if (first >= end) continue;
        const int64_t g0 = weights[i].at(first / t.vectors);
        const int64_t g1 = end == own ? w[i].groups() : weights[i].at(end / t.vectors);
        if (g0 >= g1) continue;
        if (!begun) begin(t);
        begun = true;
        detail::run_tile(
            w[i], micro, t, panels, g0, g1, 0, detail::panel_blocks(w[i]), pack,
            [&, i](const PanelTile& tile, int64_t row0, int32_t rows, T* sums, int32_t stride) {
              store(i, tile, row0, rows, sums, stride);
            },
            panel, acc);
      }
    }
  });
}

// The same for one weight; store is called without its index.
template <class T, class Begin, class Pack, class Store>
void panel_product(const PanelPacked<T>& w, PanelKernel<T>* const* micro, const PanelTiles& panels,
                   const Begin& begin, const Pack& pack, const Store& store) {
  panel_products(&w, 1, micro, panels, begin, pack,
                 [&](int64_t, const PanelTile& t, int64_t row0, int32_t rows, T* acc, int32_t acc_stride) {
                   store(t, row0, rows, acc, acc_stride);
                 });
}

// The int8 kernels of the active instruction set for a weight's entry_rows.
inline PanelKernel<int32_t>* const* word_kernels(const PackedHeader& h) {
  return h.entry_rows == 1 ? kernel_for<csr_panel_s8>(active_isa()).fn
                           : kernel_for<quad_panel_s8>(active_isa()).fn;
}

// The same for float32 weights.
inline PanelKernel<float>* const* float_kernels(const PackedHeader& h) {
  return h.entry_rows == 1 ? kernel_for<csr_panel_f32>(active_isa()).fn
                           : kernel_for<quad_panel_f32>(active_isa()).fn;
}

// One float32 weight on the active instruction set, with nothing to do before a tile.
template <class Pack, class Store>
void csr_panel_product(const PanelPacked<float>& w, const PanelTiles& panels, const Pack& pack,
                       const Store& store) {
  panel_product(w, float_kernels(*w.header), panels, [](const PanelTile&) {}, pack, store);
}

}  // namespace pared
