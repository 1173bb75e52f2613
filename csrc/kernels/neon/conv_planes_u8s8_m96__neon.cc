#include "kernels/generic/conv_planes.h"

namespace pared {

extern const conv_planes_u8s8::Table conv_planes_u8s8_m96__neon;
const conv_planes_u8s8::Table conv_planes_u8s8_m96__neon =
    PARED_CONV_PLANES_TABLE(NeonWideS8, NeonF32, 12, 3);

}  // namespace pared
