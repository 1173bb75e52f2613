#include "kernels/generic/max_pool.h"

namespace pared {

void max_pool_x4__neon(const MaxPoolArgs& a) { max_pool_plane<NeonConv>(a); }

}  // namespace pared
