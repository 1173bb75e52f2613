#include "kernels/generic/panel_io.h"

namespace pared {

void panel_store_16x16__scalar(const PanelStoreArgs& a) { store_panel<ScalarIo>(a); }

}  // namespace pared
