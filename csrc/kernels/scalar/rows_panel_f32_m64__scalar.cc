#include "kernels/generic/attention.h"

namespace pared {

extern const rows_panel_f32::Table rows_panel_f32_m64__scalar;
const rows_panel_f32::Table rows_panel_f32_m64__scalar = {
    rows_panel<ScalarF32, 1, 4, 16>, rows_panel<ScalarF32, 2, 4, 16>, rows_panel<ScalarF32, 3, 4, 16>,
    rows_panel<ScalarF32, 4, 4, 16>};

}  // namespace pared
