#include "kernels/generic/attention.h"

namespace pared {

extern const rows_panel_f32::Table rows_panel_f32_m64__neon;
const rows_panel_f32::Table rows_panel_f32_m64__neon = {
    rows_panel<NeonF32, 1, 4, 24>, rows_panel<NeonF32, 2, 4, 24>, rows_panel<NeonF32, 3, 4, 24>,
    rows_panel<NeonF32, 4, 4, 24>};

}  // namespace pared
