#include "ops/panel_product.h"

namespace pared {

std::vector<PanelTile> cut_panel_tiles(const CsrPacked& w, int64_t positions) {
  const int64_t max_vectors = w.header->tile / kPanelGroup;
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

}  // namespace pared
