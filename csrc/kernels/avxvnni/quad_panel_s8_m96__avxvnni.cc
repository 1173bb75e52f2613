#include "kernels/generic/quad_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const quad_panel_s8::Table quad_panel_s8_m96__avxvnni;
const quad_panel_s8::Table quad_panel_s8_m96__avxvnni = {
    quad_panel_rows<AvxVnniS8, 1, 3>, quad_panel_rows<AvxVnniS8, 2, 3>, quad_panel_rows<AvxVnniS8, 3, 3>,
    quad_panel_rows<AvxVnniS8, 4, 3>, quad_panel_rows<AvxVnniS8, 5, 3>, quad_panel_rows<AvxVnniS8, 6, 3>,
    quad_panel_rows<AvxVnniS8, 7, 3>, quad_panel_rows<AvxVnniS8, 8, 3>};

}  // namespace pared
