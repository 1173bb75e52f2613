#include "kernels/generic/panel_io.h"

namespace pared {

void panel_store_16x16__avx2(const PanelStoreArgs& a) { store_panel<Avx2Io>(a); }

}  // namespace pared
