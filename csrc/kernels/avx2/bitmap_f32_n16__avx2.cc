#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_f32::Table bitmap_f32_n16__avx2;
const bitmap_f32::Table bitmap_f32_n16__avx2 = PARED_BITMAP_TABLE(Avx2Expand);

}  // namespace pared
