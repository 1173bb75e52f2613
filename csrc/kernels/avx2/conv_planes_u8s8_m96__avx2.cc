#include "kernels/generic/conv_planes.h"

namespace pared {

extern const conv_planes_u8s8::Table conv_planes_u8s8_m96__avx2;
const conv_planes_u8s8::Table conv_planes_u8s8_m96__avx2 = PARED_CONV_PLANES_TABLE(Avx2S8, Avx2F32, 8, 2);

}  // namespace pared
