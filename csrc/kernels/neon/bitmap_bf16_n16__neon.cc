#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_bf16::Table bitmap_bf16_n16__neon;
const bitmap_bf16::Table bitmap_bf16_n16__neon = PARED_BITMAP_TABLE(NeonExpandPairs);

}  // namespace pared
