#include "kernels/generic/quad_panel.h"

namespace pared {

extern const quad_panel_f32::Table quad_panel_f32_m96__avx2;
const quad_panel_f32::Table quad_panel_f32_m96__avx2 = {
    quad_panel_tile<Avx2F32, 1, 3>, quad_panel_tile<Avx2F32, 2, 3>, quad_panel_tile<Avx2F32, 3, 3>,
    quad_panel_tile<Avx2F32, 4, 3>, quad_panel_rows<Avx2F32, 5, 3>, quad_panel_rows<Avx2F32, 6, 3>,
    quad_panel_rows<Avx2F32, 7, 3>, quad_panel_rows<Avx2F32, 8, 3>};

}  // namespace pared
