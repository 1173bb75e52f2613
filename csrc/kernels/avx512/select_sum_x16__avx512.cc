#include "kernels/generic/select.h"

namespace pared {

void select_sum_x16__avx512(const SelectSumArgs& args) { sum_run<Avx512Select>(args); }

}  // namespace pared
