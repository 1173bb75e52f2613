#include "kernels/generic/select.h"

namespace pared {

int64_t select_keys_x16__avx512(const SelectRun& run, int32_t* out) {
  return keys_of_run<Avx512Select>(run, out);
}

}  // namespace pared
