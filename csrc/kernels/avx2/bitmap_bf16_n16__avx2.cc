#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_bf16::Table bitmap_bf16_n16__avx2;
const bitmap_bf16::Table bitmap_bf16_n16__avx2 = PARED_BITMAP_TABLE(Avx2ExpandPairs);

}  // namespace pared
