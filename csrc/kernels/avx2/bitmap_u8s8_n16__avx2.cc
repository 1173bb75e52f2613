#include "kernels/generic/bitmap8.h"

namespace pared {

extern const bitmap_u8s8::Table bitmap_u8s8_n16__avx2;
const bitmap_u8s8::Table bitmap_u8s8_n16__avx2 = {PARED_BITMAP8_FOUR(Avx2ByteDot<Avx2Dot>)};

}  // namespace pared
