#include "kernels/generic/conv_planes.h"

namespace pared {

extern const conv_planes_u8s8::Table conv_planes_u8s8_m96__avx512vnni;
const conv_planes_u8s8::Table conv_planes_u8s8_m96__avx512vnni =
    PARED_CONV_PLANES_TABLE(VnniS8, Avx512F32, 24, 6);

}  // namespace pared
