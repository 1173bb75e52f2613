#include "kernels/generic/conv_io.h"

namespace pared {

void conv_strips_nchw__scalar(const ConvStripArgs& a) { pack_strips<ScalarConv>(a); }

}  // namespace pared
