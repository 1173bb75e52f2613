#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

// 8 groups are 16 registers of accumulators, all there are: halves.
extern const csr_panel_s8::Table csr_panel_s8_m128__avx2;
const csr_panel_s8::Table csr_panel_s8_m128__avx2 = {
    csr_panel_rows<Avx2S8, 1, 4>, csr_panel_rows<Avx2S8, 2, 2>,  csr_panel_rows<Avx2S8, 3, 1>,
    csr_panel_rows<Avx2S8, 4, 1>, csr_panel_rows<Avx2S8, 5, 1>,  csr_panel_rows<Avx2S8, 6, 1>,
    csr_panel_rows<Avx2S8, 7, 1>, csr_panel_halves<Avx2S8, 8, 1>};

}  // namespace pared
