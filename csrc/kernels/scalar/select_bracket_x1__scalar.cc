#include "kernels/generic/select.h"

namespace pared {

SelectCounts select_bracket_x1__scalar(const SelectBracketArgs& args) {
  return bracket_run<ScalarSelect>(args);
}

}  // namespace pared
