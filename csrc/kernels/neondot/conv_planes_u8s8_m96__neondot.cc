#include "kernels/generic/conv_planes.h"

namespace pared {

extern const conv_planes_u8s8::Table conv_planes_u8s8_m96__neondot;
const conv_planes_u8s8::Table conv_planes_u8s8_m96__neondot =
    PARED_CONV_PLANES_TABLE(NeonSdotS8, NeonF32, 24, 3);

}  // namespace pared
