#include "kernels/generic/panel_io.h"

namespace pared {

void panel_store_16x16__avx512(const PanelStoreArgs& a) { store_panel<Avx512Io>(a); }

}  // namespace pared
