#include "kernels/generic/panel_io.h"

namespace pared {

void panel_pack_16x16__avx512(const PanelPackArgs& a) { pack_panel<Avx512Io>(a); }

}  // namespace pared
