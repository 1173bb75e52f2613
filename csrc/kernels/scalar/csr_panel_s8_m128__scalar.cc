#include "kernels/generic/csr_panel.h"
#include "kernels/generic/simd_s8.h"

namespace pared {

extern const csr_panel_s8::Table csr_panel_s8_m128__scalar;
const csr_panel_s8::Table csr_panel_s8_m128__scalar = {
    csr_panel_rows<ScalarS8, 1, 1>, csr_panel_rows<ScalarS8, 2, 1>, csr_panel_rows<ScalarS8, 3, 1>,
    csr_panel_rows<ScalarS8, 4, 1>, csr_panel_rows<ScalarS8, 5, 1>, csr_panel_rows<ScalarS8, 6, 1>,
    csr_panel_rows<ScalarS8, 7, 1>, csr_panel_rows<ScalarS8, 8, 1>};

}  // namespace pared
