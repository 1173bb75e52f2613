#include "kernels/generic/select.h"

namespace pared {

void select_group_x16__avx512(const SelectGroupArgs& args) { group_run<Avx512Select>(args); }

}  // namespace pared
