#include "kernels/generic/quad_panel.h"

namespace pared {

extern const quad_panel_f32::Table quad_panel_f32_m96__avx512;
const quad_panel_f32::Table quad_panel_f32_m96__avx512 = {quad_panel_one<6>,
                                                          quad_panel_two<6>,
                                                          quad_panel_tile<Avx512F32, 3, 6>,
                                                          quad_panel_tile<Avx512F32, 4, 6>,
                                                          quad_panel_rows<Avx512F32, 5, 6>,
                                                          quad_panel_rows<Avx512F32, 6, 6>,
                                                          quad_panel_rows<Avx512F32, 7, 6>,
                                                          quad_panel_rows<Avx512F32, 8, 6>};

}  // namespace pared
