#include "kernels/generic/attention.h"

namespace pared {

extern const rows_panel_f32::Table rows_panel_f32_m64__avx2;
const rows_panel_f32::Table rows_panel_f32_m64__avx2 = {
    rows_panel<Avx2F32, 1, 3, 12>, rows_panel<Avx2F32, 2, 3, 12>, rows_panel<Avx2F32, 3, 3, 12>,
    rows_panel<Avx2F32, 4, 3, 12>};

}  // namespace pared
