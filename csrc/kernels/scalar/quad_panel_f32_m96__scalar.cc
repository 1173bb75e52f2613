#include "kernels/generic/quad_panel.h"

namespace pared {

extern const quad_panel_f32::Table quad_panel_f32_m96__scalar;
const quad_panel_f32::Table quad_panel_f32_m96__scalar = {
    quad_panel_rows<ScalarF32, 1, 16>, quad_panel_rows<ScalarF32, 2, 16>, quad_panel_rows<ScalarF32, 3, 16>,
    quad_panel_rows<ScalarF32, 4, 16>, quad_panel_rows<ScalarF32, 5, 16>, quad_panel_rows<ScalarF32, 6, 16>,
    quad_panel_rows<ScalarF32, 7, 16>, quad_panel_rows<ScalarF32, 8, 16>};

}  // namespace pared
