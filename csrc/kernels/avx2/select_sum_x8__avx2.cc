#include "kernels/generic/select.h"

namespace pared {

void select_sum_x8__avx2(const SelectSumArgs& args) { sum_run<Avx2Select>(args); }

}  // namespace pared
