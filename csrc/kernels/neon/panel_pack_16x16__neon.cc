#include "kernels/generic/panel_io.h"

namespace pared {

void panel_pack_16x16__neon(const PanelPackArgs& a) { pack_panel<NeonIo>(a); }

}  // namespace pared
