#include "kernels/generic/bitmap8.h"

namespace pared {

extern const bitmap_u8s8::Table bitmap_u8s8_n16__scalar;
const bitmap_u8s8::Table bitmap_u8s8_n16__scalar = PARED_BITMAP8_TABLE(ScalarByteDot);

}  // namespace pared
