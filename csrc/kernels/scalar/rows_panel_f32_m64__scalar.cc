#include "kernels/generic/attention.h"

namespace pared {

extern const rows_panel_f32::Table rows_panel_f32_m64__scalar;
const rows_panel_f32::Table rows_panel_f32_m64__scalar = {
    rows_panel<ScalarF32, 1, 8, 16>, rows_panel<ScalarF32, 2, 8, 16>, rows_panel<ScalarF32, 3, 8, 16>,
    rows_panel<ScalarF32, 4, 8, 16>};

}  // namespace pared
