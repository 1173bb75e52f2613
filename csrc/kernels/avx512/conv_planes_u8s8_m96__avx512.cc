#include "kernels/generic/conv_planes.h"

namespace pared {

extern const conv_planes_u8s8::Table conv_planes_u8s8_m96__avx512;
const conv_planes_u8s8::Table conv_planes_u8s8_m96__avx512 =
    PARED_CONV_PLANES_TABLE(Avx512S8, Avx512F32, 16, 4);

}  // namespace pared
