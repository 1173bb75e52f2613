#include "kernels/generic/select.h"

namespace pared {

void select_group_x8__avx2(const SelectGroupArgs& args) { group_run<Avx2Select>(args); }

}  // namespace pared
