#include "kernels/generic/panel_dequantize.h"

namespace pared {

void panel_dequantize_x8__avx2(const PanelDequantizeArgs& a) { dequantize_panel<Avx2Dequantize>(a); }

}  // namespace pared
