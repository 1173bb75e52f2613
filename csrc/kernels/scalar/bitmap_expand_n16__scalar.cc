#include "kernels/generic/bitmap8.h"

namespace pared {

void bitmap_expand_n16__scalar(const BitmapExpandArgs& a) { expand_groups<ScalarBytes>(a); }

}  // namespace pared
