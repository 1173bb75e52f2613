#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_f32::Table bitmap_f32_n16__avx512;
const bitmap_f32::Table bitmap_f32_n16__avx512 = PARED_BITMAP_TABLE(Avx512Expand);

}  // namespace pared
