#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_bf16::Table bitmap_bf16_n16__avx512;
const bitmap_bf16::Table bitmap_bf16_n16__avx512 = PARED_BITMAP_TABLE(Avx512ExpandPairs);

}  // namespace pared
