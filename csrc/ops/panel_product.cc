#include "ops/panel_product.h"

#include <algorithm>

namespace pared {

PanelTiles cut_panel_tiles(const PackedHeader& w, int64_t positions, int64_t images) {
  const int64_t max_vectors = w.tile / kPanelGroup;
  const int64_t vectors = (positions + kPanelGroup - 1) / kPanelGroup;
  // One vector too many goes with the last full tile, whose panel may be wider than the weight's.
  const bool widened = w.entry_rows == 1 && max_vectors < kPanelMaxGroups && vectors % max_vectors == 1;
  const int64_t tiles = std::max<int64_t>(1, (vectors + max_vectors - 1) / max_vectors - (widened ? 1 : 0));
  PanelTiles out;
  out.tiles.reserve(images * tiles);
  int32_t widest = kPanelGroup;
  for (int64_t i = 0; i < images * tiles; ++i) {
    const int64_t image = i / tiles, v0 = vectors * (i % tiles) / tiles,
                  v1 = vectors * (i % tiles + 1) / tiles;
    const int64_t first = v0 * kPanelGroup, end = std::min(positions, v1 * kPanelGroup);
    out.tiles.push_back(
        {image * positions + first, static_cast<int32_t>(end - first), static_cast<int32_t>(v1 - v0)});
    widest = std::max(widest, static_cast<int32_t>(v1 - v0) * kPanelGroup);
  }
  out.unit_stride = takes_stride(w, widest) ? widest : w.tile;
  return out;
}

PanelTiles cut_row_tiles(const PackedHeader& w, int64_t positions) {
  PanelTiles out = cut_panel_tiles(w, positions);
  out.store_groups = groups_a_store(out.unit_stride);
  out.real_alone = true;
  return out;
}

void place_taps_in_order(const UnitCode& code, PanelTiles& panels) {
  const int64_t lines = panels.unit_stride / kPanelGroup;
  panels.channel_lines = static_cast<int32_t>(code.taps * lines);
  panels.tap_lines.assign(UINT8_MAX + 1, 0);
  for (int i = 0; i < code.taps; ++i) panels.tap_lines[i] = static_cast<uint16_t>(i * lines);
}

}  // namespace pared
