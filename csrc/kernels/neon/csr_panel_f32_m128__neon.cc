#include "kernels/generic/csr_panel.h"

namespace pared {

extern const csr_panel_f32::Table csr_panel_f32_m128__neon;
const csr_panel_f32::Table csr_panel_f32_m128__neon = {
    csr_panel_rows<NeonF32, 1, 4>,   csr_panel_rows<NeonF32, 2, 2>,   csr_panel_rows<NeonF32, 3, 1>,
    csr_panel_rows<NeonF32, 4, 1>,   csr_panel_halves<NeonF32, 5, 1>, csr_panel_halves<NeonF32, 6, 1>,
    csr_panel_halves<NeonF32, 7, 1>, csr_panel_halves<NeonF32, 8, 1>};

}  // namespace pared
