#include "kernels/generic/bitmap8.h"

namespace pared {

bool bitmap_expand_n16__scalar(const BitmapExpandArgs& a) { return expand_groups<ScalarBytes>(a); }

}  // namespace pared
