#include "kernels/generic/quad_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const quad_panel_s8::Table quad_panel_s8_m96__avx512;
const quad_panel_s8::Table quad_panel_s8_m96__avx512 = {
    quad_panel_rows<Avx512S8, 1, 4>, quad_panel_rows<Avx512S8, 2, 4>, quad_panel_rows<Avx512S8, 3, 4>,
    quad_panel_rows<Avx512S8, 4, 4>, quad_panel_rows<Avx512S8, 5, 4>, quad_panel_rows<Avx512S8, 6, 4>,
    quad_panel_rows<Avx512S8, 7, 4>, quad_panel_rows<Avx512S8, 8, 4>};

}  // namespace pared
