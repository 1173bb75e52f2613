#include "kernels/generic/select.h"

namespace pared {

SelectCounts select_bracket_x32__avx512vbmi2(const SelectBracketArgs& args) {
  return bracket_run<Avx512Select>(args);
}

}  // namespace pared
