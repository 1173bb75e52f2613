#include "kernels/generic/bitmap8.h"

namespace pared {

#define PARED_TILE(T, G) scalar_expand_multiply<T, G>
extern const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__scalar;
const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__scalar = PARED_EXPAND_TILES(PARED_TILE);

}  // namespace pared
