#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

// 8 groups are 16 registers of accumulators, all there are: halves.
extern const csr_panel_s8::Table csr_panel_s8_m128__avxvnni;
const csr_panel_s8::Table csr_panel_s8_m128__avxvnni = {
    csr_panel_rows<AvxVnniS8, 1, 4>, csr_panel_rows<AvxVnniS8, 2, 2>,  csr_panel_rows<AvxVnniS8, 3, 2>,
    csr_panel_rows<AvxVnniS8, 4, 1>, csr_panel_rows<AvxVnniS8, 5, 1>,  csr_panel_rows<AvxVnniS8, 6, 1>,
    csr_panel_rows<AvxVnniS8, 7, 1>, csr_panel_halves<AvxVnniS8, 8, 1>};

}  // namespace pared
