#include "kernels/generic/panel_dequantize.h"

namespace pared {

void panel_dequantize_x1__scalar(const PanelDequantizeArgs& a) { dequantize_panel<ScalarDequantize>(a); }

}  // namespace pared
