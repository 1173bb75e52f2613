#include "kernels/generic/conv_planes.h"

namespace pared {

extern const conv_planes_u8s8::Table conv_planes_u8s8_m96__scalar;
const conv_planes_u8s8::Table conv_planes_u8s8_m96__scalar =
    PARED_CONV_PLANES_TABLE(ScalarS8, ScalarF32, 24, 8);

}  // namespace pared
