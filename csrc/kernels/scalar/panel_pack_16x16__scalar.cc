#include "kernels/generic/panel_io.h"

namespace pared {

void panel_pack_16x16__scalar(const PanelPackArgs& a) { pack_panel<ScalarIo>(a); }

}  // namespace pared
