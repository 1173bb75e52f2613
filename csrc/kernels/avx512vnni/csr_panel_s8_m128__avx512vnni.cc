#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const csr_panel_s8::Table csr_panel_s8_m128__avx512vnni;
const csr_panel_s8::Table csr_panel_s8_m128__avx512vnni = {
    csr_panel_rows<VnniS8, 1, 8>, csr_panel_rows<VnniS8, 2, 4>, csr_panel_rows<VnniS8, 3, 4>,
    csr_panel_rows<VnniS8, 4, 2>, csr_panel_rows<VnniS8, 5, 2>, csr_panel_rows<VnniS8, 6, 1>,
    csr_panel_rows<VnniS8, 7, 1>, csr_panel_rows<VnniS8, 8, 1>};

}  // namespace pared
