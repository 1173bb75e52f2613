#include "kernels/generic/bitmap.h"

namespace pared {

extern const bitmap_bf16::Table bitmap_bf16_n16__scalar;
const bitmap_bf16::Table bitmap_bf16_n16__scalar = PARED_BITMAP_TABLE(ScalarExpandPairs);

}  // namespace pared
