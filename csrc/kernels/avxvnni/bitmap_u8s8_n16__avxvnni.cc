#include "kernels/generic/bitmap8.h"

namespace pared {

using Dot = Avx2ByteDot<AvxVnniDot>;

extern const bitmap_u8s8::Table bitmap_u8s8_n16__avxvnni;
const bitmap_u8s8::Table bitmap_u8s8_n16__avxvnni = {PARED_BITMAP8_FOUR(Dot), bitmap8_groups<Dot, 5>,
                                                     bitmap8_groups<Dot, 6>};

}  // namespace pared
