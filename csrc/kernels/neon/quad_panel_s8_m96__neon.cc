#include "kernels/generic/quad_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const quad_panel_s8::Table quad_panel_s8_m96__neon;
const quad_panel_s8::Table quad_panel_s8_m96__neon = {
    quad_panel_rows<NeonWideS8, 1, 2>, quad_panel_rows<NeonWideS8, 2, 2>, quad_panel_rows<NeonWideS8, 3, 2>,
    quad_panel_rows<NeonWideS8, 4, 2>, quad_panel_rows<NeonWideS8, 5, 2>, quad_panel_rows<NeonWideS8, 6, 2>,
    quad_panel_rows<NeonWideS8, 7, 2>, quad_panel_rows<NeonWideS8, 8, 2>};

}  // namespace pared
