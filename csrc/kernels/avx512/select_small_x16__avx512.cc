#include "kernels/generic/select.h"

namespace pared {

int32_t select_small_x16__avx512(const int32_t* keys, int32_t n, int32_t k) {
  return small_select<Avx512Select>(keys, n, k);
}

}  // namespace pared
