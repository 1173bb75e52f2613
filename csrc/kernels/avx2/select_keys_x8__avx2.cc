#include "kernels/generic/select.h"

namespace pared {

int64_t select_keys_x8__avx2(const SelectRun& run, int32_t* out) { return keys_of_run<Avx2Select>(run, out); }

}  // namespace pared
