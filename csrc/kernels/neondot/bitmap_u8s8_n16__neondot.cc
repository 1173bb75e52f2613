#include "kernels/generic/bitmap8.h"

namespace pared {

using Dot = NeonByteDot<NeonUdotProducts>;

extern const bitmap_u8s8::Table bitmap_u8s8_n16__neondot;
const bitmap_u8s8::Table bitmap_u8s8_n16__neondot = {bitmap8_groups<Dot, 1>, bitmap8_groups<Dot, 2>,
                                                     bitmap8_groups<Dot, 3>, bitmap8_groups<Dot, 4>,
                                                     bitmap8_groups<Dot, 5>, bitmap8_groups<Dot, 6>};

}  // namespace pared
