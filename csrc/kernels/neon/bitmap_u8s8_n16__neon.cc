#include "kernels/generic/bitmap8.h"

namespace pared {

using Dot = NeonByteDot<NeonWideProducts>;

extern const bitmap_u8s8::Table bitmap_u8s8_n16__neon;
const bitmap_u8s8::Table bitmap_u8s8_n16__neon = {bitmap8_groups<Dot, 1>, bitmap8_groups<Dot, 2>,
                                                  bitmap8_groups<Dot, 3>};

}  // namespace pared
