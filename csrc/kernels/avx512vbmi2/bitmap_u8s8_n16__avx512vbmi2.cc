#include "kernels/generic/bitmap8.h"

namespace pared {

extern const bitmap_u8s8::Table bitmap_u8s8_n16__avx512vbmi2;
const bitmap_u8s8::Table bitmap_u8s8_n16__avx512vbmi2 = PARED_BITMAP8_TABLE(Vbmi2Dot);

}  // namespace pared
