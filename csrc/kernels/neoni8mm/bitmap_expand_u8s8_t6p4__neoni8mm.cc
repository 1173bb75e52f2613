#include "kernels/generic/bitmap8.h"

namespace pared {

#define PARED_TILE(T, G) expand_multiply_lanes<NeonUsdotProducts, T, G>
extern const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__neoni8mm;
const bitmap_expand_u8s8::Table bitmap_expand_u8s8_t6p4__neoni8mm = PARED_EXPAND_TILES(PARED_TILE);

}  // namespace pared
