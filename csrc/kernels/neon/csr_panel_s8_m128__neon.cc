#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

// Two registers of sums a vector: 24 of three groups.
extern const csr_panel_s8::Table csr_panel_s8_m128__neon;
const csr_panel_s8::Table csr_panel_s8_m128__neon = {
    csr_panel_rows<NeonWideS8, 1, 2>,   csr_panel_rows<NeonWideS8, 2, 1>,
    csr_panel_rows<NeonWideS8, 3, 1>,   csr_panel_halves<NeonWideS8, 4, 1>,
    csr_panel_halves<NeonWideS8, 5, 1>, csr_panel_halves<NeonWideS8, 6, 1>,
    csr_panel_thirds<NeonWideS8, 7, 1>, csr_panel_thirds<NeonWideS8, 8, 1>};

}  // namespace pared
