#include "kernels/generic/bitmap8.h"

namespace pared {

extern const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__avx512vbmi2;
const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__avx512vbmi2 =
    PARED_EXPAND_TABLE(VnniDot, Vbmi2Bytes);

}  // namespace pared
