#include "kernels/generic/select.h"

namespace pared {

int64_t select_mask_x8__avx2(const SelectMaskArgs& args) { return mask_run<Avx2Select>(args); }

}  // namespace pared
