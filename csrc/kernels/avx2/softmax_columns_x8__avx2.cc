#include "kernels/generic/attention.h"

namespace pared {

void softmax_columns_x8__avx2(const SoftmaxArgs& a) { softmax_lanes<Avx2F32>(a); }

}  // namespace pared
