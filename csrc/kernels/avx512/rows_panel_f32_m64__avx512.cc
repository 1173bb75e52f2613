#include "kernels/generic/attention.h"

namespace pared {

extern const rows_panel_f32::Table rows_panel_f32_m64__avx512;
const rows_panel_f32::Table rows_panel_f32_m64__avx512 = {
    rows_panel<Avx512F32, 1, 4, 24>, rows_panel<Avx512F32, 2, 4, 24>, rows_panel<Avx512F32, 3, 4, 24>,
    rows_panel<Avx512F32, 4, 4, 24>};

}  // namespace pared
