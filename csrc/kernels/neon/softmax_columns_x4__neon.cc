#include "kernels/generic/attention.h"

namespace pared {

void softmax_columns_x4__neon(const SoftmaxArgs& a) { softmax_lanes<NeonF32>(a); }

}  // namespace pared
