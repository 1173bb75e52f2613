#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_f32::Table bitmap_f32_n16__scalar;
const bitmap_f32::Table bitmap_f32_n16__scalar = PARED_BITMAP_TABLE(ScalarExpand);

}  // namespace pared
