#include "kernels/generic/attention.h"

namespace pared {

void softmax_columns_x1__scalar(const SoftmaxArgs& a) { softmax_lanes<ScalarF32>(a); }

}  // namespace pared
