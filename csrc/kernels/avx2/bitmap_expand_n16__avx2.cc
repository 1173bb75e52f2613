#include "kernels/generic/bitmap8.h"

namespace pared {

bool bitmap_expand_n16__avx2(const BitmapExpandArgs& a) { return expand_groups<Avx2Bytes>(a); }

}  // namespace pared
