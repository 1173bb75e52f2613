#include "kernels/generic/select.h"

namespace pared {

int64_t select_keys_x1__scalar(const SelectRun& run, int32_t* out) {
  return keys_of_run<ScalarSelect>(run, out);
}

}  // namespace pared
