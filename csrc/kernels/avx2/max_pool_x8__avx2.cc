#include "kernels/generic/max_pool.h"

namespace pared {

void max_pool_x8__avx2(const MaxPoolArgs& a) { max_pool_plane<Avx2Conv>(a); }

}  // namespace pared
