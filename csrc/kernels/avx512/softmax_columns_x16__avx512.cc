#include "kernels/generic/attention.h"

namespace pared {

void softmax_columns_x16__avx512(const SoftmaxArgs& a) { softmax_lanes<Avx512F32>(a); }

}  // namespace pared
