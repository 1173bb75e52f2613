#include "kernels/generic/select.h"

namespace pared {

void select_group_x16__neon(const SelectGroupArgs& args) { group_run<NeonSelect>(args); }

}  // namespace pared
