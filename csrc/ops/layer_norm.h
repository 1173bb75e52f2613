// Layer normalisation of rows, after a residual that is added to them.
#pragma once

#include "kernels/types.h"

namespace pared {

// `row` is the operation's own. No memory that is written overlaps another's, except that `sum` may be
// `residual` or x itself.
void normalise(const LayerNormArgs& args);

}  // namespace pared
