#include "kernels/generic/bitmap8.h"

namespace pared {

extern const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__scalar;
const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__scalar = PARED_EXPAND_TABLE(ScalarDot, ScalarBytes);

}  // namespace pared
