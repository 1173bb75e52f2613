#include "kernels/generic/quad_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const quad_panel_s8::Table quad_panel_s8_m96__avx2;
const quad_panel_s8::Table quad_panel_s8_m96__avx2 = {
    quad_panel_rows<Avx2S8, 1, 2>, quad_panel_rows<Avx2S8, 2, 2>, quad_panel_rows<Avx2S8, 3, 2>,
    quad_panel_rows<Avx2S8, 4, 2>, quad_panel_rows<Avx2S8, 5, 2>, quad_panel_rows<Avx2S8, 6, 2>,
    quad_panel_rows<Avx2S8, 7, 2>, quad_panel_rows<Avx2S8, 8, 2>};

}  // namespace pared
