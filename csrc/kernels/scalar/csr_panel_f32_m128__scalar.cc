#include "kernels/generic/csr_panel.h"

namespace pared {

extern const csr_panel_f32::Table csr_panel_f32_m128__scalar;
const csr_panel_f32::Table csr_panel_f32_m128__scalar = {
    csr_panel_rows<ScalarF32, 1, 1>, csr_panel_rows<ScalarF32, 2, 1>, csr_panel_rows<ScalarF32, 3, 1>,
    csr_panel_rows<ScalarF32, 4, 1>, csr_panel_rows<ScalarF32, 5, 1>, csr_panel_rows<ScalarF32, 6, 1>,
    csr_panel_rows<ScalarF32, 7, 1>, csr_panel_rows<ScalarF32, 8, 1>};

}  // namespace pared
