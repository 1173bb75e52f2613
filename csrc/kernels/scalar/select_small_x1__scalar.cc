#include "kernels/generic/select.h"

namespace pared {

int32_t select_small_x1__scalar(const int32_t* keys, int32_t n, int32_t k) {
  return small_select<ScalarSelect>(keys, n, k);
}

}  // namespace pared
