#include "kernels/generic/quad_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const quad_panel_s8::Table quad_panel_s8_m96__avx512vnni;
const quad_panel_s8::Table quad_panel_s8_m96__avx512vnni = {
    quad_panel_tile<VnniS8, 1, 6>, quad_panel_tile<VnniS8, 2, 6>, quad_panel_tile<VnniS8, 3, 6>,
    quad_panel_tile<VnniS8, 4, 6>, quad_panel_rows<VnniS8, 5, 6>, quad_panel_rows<VnniS8, 6, 6>,
    quad_panel_rows<VnniS8, 7, 6>, quad_panel_rows<VnniS8, 8, 6>};

}  // namespace pared
