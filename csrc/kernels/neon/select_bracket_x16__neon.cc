#include "kernels/generic/select.h"

namespace pared {

SelectCounts select_bracket_x16__neon(const SelectBracketArgs& args) {
  return has_narrow_keys(args.run) ? bracket_narrow_run<NeonSelectAndNarrow>(args)
                                   : bracket_run<NeonSelect>(args);
}

}  // namespace pared
