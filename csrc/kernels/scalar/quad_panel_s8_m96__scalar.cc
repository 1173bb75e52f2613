#include "kernels/generic/quad_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const quad_panel_s8::Table quad_panel_s8_m96__scalar;
const quad_panel_s8::Table quad_panel_s8_m96__scalar = {
    quad_panel_rows<ScalarS8, 1, 16>, quad_panel_rows<ScalarS8, 2, 16>, quad_panel_rows<ScalarS8, 3, 16>,
    quad_panel_rows<ScalarS8, 4, 16>, quad_panel_rows<ScalarS8, 5, 16>, quad_panel_rows<ScalarS8, 6, 16>,
    quad_panel_rows<ScalarS8, 7, 16>, quad_panel_rows<ScalarS8, 8, 16>};

}  // namespace pared
