#include "kernels/generic/max_pool.h"

namespace pared {

void max_pool_x16__avx512(const MaxPoolArgs& a) { max_pool_plane<Avx512Conv>(a); }

}  // namespace pared
