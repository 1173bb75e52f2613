#include "kernels/generic/panel_io.h"

namespace pared {

void panel_store_16x16__neon(const PanelStoreArgs& a) { store_panel<NeonIo>(a); }

}  // namespace pared
