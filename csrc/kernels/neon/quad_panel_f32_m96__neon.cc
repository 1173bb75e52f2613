#include "kernels/generic/quad_panel.h"

namespace pared {

extern const quad_panel_f32::Table quad_panel_f32_m96__neon;
const quad_panel_f32::Table quad_panel_f32_m96__neon = {
    quad_panel_rows<NeonF32, 1, 6>, quad_panel_rows<NeonF32, 2, 6>, quad_panel_rows<NeonF32, 3, 6>,
    quad_panel_rows<NeonF32, 4, 6>, quad_panel_rows<NeonF32, 5, 6>, quad_panel_rows<NeonF32, 6, 6>,
    quad_panel_rows<NeonF32, 7, 6>, quad_panel_rows<NeonF32, 8, 6>};

}  // namespace pared
