#include "kernels/generic/select.h"

namespace pared {

int64_t select_mask_x16__avx512(const SelectMaskArgs& args) { return mask_run<Avx512Select>(args); }

}  // namespace pared
