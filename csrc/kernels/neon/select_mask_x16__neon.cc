#include "kernels/generic/select.h"

namespace pared {

int64_t select_mask_x16__neon(const SelectMaskArgs& args) { return mask_run<NeonSelect>(args); }

}  // namespace pared
