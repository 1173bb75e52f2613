#include "kernels/generic/bitmap8.h"

namespace pared {

void bitmap_expand_n16__avx2(const BitmapExpandArgs& a) { expand_groups<DepositBytes>(a); }

}  // namespace pared
