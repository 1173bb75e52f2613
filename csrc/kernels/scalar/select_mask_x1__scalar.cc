#include "kernels/generic/select.h"

namespace pared {

int64_t select_mask_x1__scalar(const SelectMaskArgs& args) { return mask_run<ScalarSelect>(args); }

}  // namespace pared
