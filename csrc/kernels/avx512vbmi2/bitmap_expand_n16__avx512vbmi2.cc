#include "kernels/generic/bitmap8.h"

namespace pared {

bool bitmap_expand_n16__avx512vbmi2(const BitmapExpandArgs& a) { return expand_groups<Vbmi2Bytes>(a); }

}  // namespace pared
