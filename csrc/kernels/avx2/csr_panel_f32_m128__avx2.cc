#include "kernels/generic/csr_panel.h"

namespace pared {

// 8 groups are 16 registers of accumulators, all there are: halves.
extern const csr_panel_f32::Table csr_panel_f32_m128__avx2;
const csr_panel_f32::Table csr_panel_f32_m128__avx2 = {
    csr_panel_rows<Avx2F32, 1, 4>, csr_panel_rows<Avx2F32, 2, 2>,  csr_panel_rows<Avx2F32, 3, 2>,
    csr_panel_rows<Avx2F32, 4, 1>, csr_panel_rows<Avx2F32, 5, 1>,  csr_panel_rows<Avx2F32, 6, 1>,
    csr_panel_rows<Avx2F32, 7, 1>, csr_panel_halves<Avx2F32, 8, 1>};

}  // namespace pared
