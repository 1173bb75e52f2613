#include "kernels/generic/panel_io.h"

namespace pared {

void panel_pack_16x16__avx2(const PanelPackArgs& a) {
  pack_elements(a, 0, a.vectors * kPanelGroup, 0, a.units);
}

}  // namespace pared
