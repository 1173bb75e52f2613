#include "kernels/generic/select.h"

namespace pared {

void select_sum_x1__scalar(const SelectSumArgs& args) { sum_run<ScalarSelect>(args); }

}  // namespace pared
