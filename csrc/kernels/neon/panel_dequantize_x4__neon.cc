#include "kernels/generic/panel_dequantize.h"

namespace pared {

void panel_dequantize_x4__neon(const PanelDequantizeArgs& a) { dequantize_panel<NeonDequantize>(a); }

}  // namespace pared
