#include "kernels/generic/panel_io.h"

namespace pared {

void panel_pack_16x16__avx2(const PanelPackArgs& a) { pack_panel<Avx2Io>(a); }

}  // namespace pared
