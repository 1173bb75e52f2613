#include "kernels/generic/select.h"

namespace pared {

void select_group_x1__scalar(const SelectGroupArgs& args) { group_run<ScalarSelect>(args); }

}  // namespace pared
