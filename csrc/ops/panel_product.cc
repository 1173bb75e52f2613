#include "ops/panel_product.h"

namespace pared {

std::vector<PanelTile> cut_panel_tiles(const PackedHeader& w, int64_t positions) {
  const int64_t max_vectors = w.tile / kPanelGroup;
  const int64_t vectors = (positions + kPanelGroup - 1) / kPanelGroup;
  const int64_t tiles = (vectors + max_vectors - 1) / max_vectors;
  std::vector<PanelTile> out;
  out.reserve(tiles);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t v0 = vectors * i / tiles, v1 = vectors * (i + 1) / tiles;
    const int64_t first = v0 * kPanelGroup, end = std::min(positions, v1 * kPanelGroup);
    out.push_back({first, static_cast<int32_t>(end - first), static_cast<int32_t>(v1 - v0)});
  }
  return out;
}

int32_t panel_shift(const PackedHeader& w, const std::vector<PanelTile>& tiles) {
  if (w.entry_rows != 1) return 0;
  int32_t widest = kPanelGroup, shift = 0;
  for (const PanelTile& t : tiles) widest = std::max(widest, t.vectors * kPanelGroup);
  for (int32_t half = w.tile / 2; widest <= half && half % kPanelGroup == 0; half /= 2) ++shift;
  return shift;
}

}  // namespace pared
