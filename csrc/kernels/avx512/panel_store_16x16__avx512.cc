#include "kernels/generic/panel_io.h"

namespace pared {

void panel_store_16x16__avx512(const PanelStoreArgs& a) { store_elements(a, 0, a.positions, 0, a.rows); }

}  // namespace pared
