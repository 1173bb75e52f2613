#include "kernels/generic/select.h"

namespace pared {

void select_sum_x16__neon(const SelectSumArgs& args) { sum_run<NeonSelect>(args); }

}  // namespace pared
