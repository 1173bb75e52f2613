#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

// Halves from five groups on: of more than 16 vectors compilers leave loops as they are, and sums in memory.
extern const csr_panel_s8::Table csr_panel_s8_m128__neondot;
const csr_panel_s8::Table csr_panel_s8_m128__neondot = {
    csr_panel_rows<NeonSdotS8, 1, 4>,   csr_panel_rows<NeonSdotS8, 2, 2>,
    csr_panel_rows<NeonSdotS8, 3, 2>,   csr_panel_rows<NeonSdotS8, 4, 1>,
    csr_panel_halves<NeonSdotS8, 5, 1>, csr_panel_halves<NeonSdotS8, 6, 1>,
    csr_panel_halves<NeonSdotS8, 7, 1>, csr_panel_halves<NeonSdotS8, 8, 1>};

}  // namespace pared
