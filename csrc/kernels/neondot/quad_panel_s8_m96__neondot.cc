#include "kernels/generic/quad_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const quad_panel_s8::Table quad_panel_s8_m96__neondot;
const quad_panel_s8::Table quad_panel_s8_m96__neondot = {
    quad_panel_rows<NeonSdotS8, 1, 6>, quad_panel_rows<NeonSdotS8, 2, 6>, quad_panel_rows<NeonSdotS8, 3, 6>,
    quad_panel_rows<NeonSdotS8, 4, 6>, quad_panel_rows<NeonSdotS8, 5, 6>, quad_panel_rows<NeonSdotS8, 6, 6>,
    quad_panel_rows<NeonSdotS8, 7, 6>, quad_panel_rows<NeonSdotS8, 8, 6>};

}  // namespace pared
