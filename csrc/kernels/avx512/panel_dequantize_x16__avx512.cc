#include "kernels/generic/panel_dequantize.h"

namespace pared {

void panel_dequantize_x16__avx512(const PanelDequantizeArgs& a) { dequantize_panel<Avx512Dequantize>(a); }

}  // namespace pared
