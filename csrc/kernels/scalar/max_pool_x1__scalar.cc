#include "kernels/generic/max_pool.h"

namespace pared {

void max_pool_x1__scalar(const MaxPoolArgs& a) { max_pool_plane<ScalarConv>(a); }

}  // namespace pared
