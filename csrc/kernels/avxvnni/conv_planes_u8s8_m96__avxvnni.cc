#include "kernels/generic/conv_planes.h"

namespace pared {

extern const conv_planes_u8s8::Table conv_planes_u8s8_m96__avxvnni;
const conv_planes_u8s8::Table conv_planes_u8s8_m96__avxvnni =
    PARED_CONV_PLANES_TABLE(AvxVnniS8, Avx2F32, 12, 3);

}  // namespace pared
