#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const csr_panel_s8::Table csr_panel_s8_m128__avx512;
const csr_panel_s8::Table csr_panel_s8_m128__avx512 = {
    csr_panel_rows<Avx512S8, 1, 6>, csr_panel_rows<Avx512S8, 2, 3>, csr_panel_rows<Avx512S8, 3, 2>,
    csr_panel_rows<Avx512S8, 4, 2>, csr_panel_rows<Avx512S8, 5, 1>, csr_panel_rows<Avx512S8, 6, 1>,
    csr_panel_rows<Avx512S8, 7, 1>, csr_panel_rows<Avx512S8, 8, 1>};

}  // namespace pared
