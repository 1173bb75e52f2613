#include "kernels/generic/select.h"

namespace pared {

int64_t select_keys_x16__neon(const SelectRun& run, int32_t* out) {
  return keys_of_run<NeonSelect>(run, out);
}

}  // namespace pared
