#include "kernels/generic/select.h"

namespace pared {

int32_t select_small_x16__neon(const int32_t* keys, int32_t n, int32_t k) {
  return small_select<NeonSelect>(keys, n, k);
}

}  // namespace pared
