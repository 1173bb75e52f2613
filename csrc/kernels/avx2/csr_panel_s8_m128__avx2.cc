#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

// Beside the sums stand two halves of a value, two of an operand and a product: halves from six groups on.
extern const csr_panel_s8::Table csr_panel_s8_m128__avx2;
const csr_panel_s8::Table csr_panel_s8_m128__avx2 = {
    csr_panel_rows<Avx2S8, 1, 4>,   csr_panel_rows<Avx2S8, 2, 2>,  csr_panel_rows<Avx2S8, 3, 1>,
    csr_panel_rows<Avx2S8, 4, 1>,   csr_panel_rows<Avx2S8, 5, 1>,  csr_panel_halves<Avx2S8, 6, 1>,
    csr_panel_halves<Avx2S8, 7, 1>, csr_panel_halves<Avx2S8, 8, 1>};

}  // namespace pared
