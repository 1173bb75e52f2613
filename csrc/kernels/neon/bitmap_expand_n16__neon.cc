#include "kernels/generic/bitmap8.h"

namespace pared {

bool bitmap_expand_n16__neon(const BitmapExpandArgs& a) { return expand_groups<NeonBytes>(a); }

}  // namespace pared
