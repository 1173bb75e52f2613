#include "kernels/generic/select.h"

namespace pared {

SelectCounts select_bracket_x16__avx512(const SelectBracketArgs& args);

SelectCounts select_bracket_x32__avx512vbmi2(const SelectBracketArgs& args) {
  return has_narrow_keys(args.run) ? bracket_narrow_run<Avx512Select>(args)
                                   : select_bracket_x16__avx512(args);
}

}  // namespace pared
