#include "kernels/generic/select.h"

namespace pared {

SelectCounts select_bracket_x8__avx2(const SelectBracketArgs& args) { return bracket_run<Avx2Select>(args); }

}  // namespace pared
