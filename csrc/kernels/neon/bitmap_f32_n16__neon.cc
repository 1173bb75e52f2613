#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_f32::Table bitmap_f32_n16__neon;
const bitmap_f32::Table bitmap_f32_n16__neon = PARED_BITMAP_TABLE(NeonExpand);

}  // namespace pared
