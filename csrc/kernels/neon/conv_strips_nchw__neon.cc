#include "kernels/generic/conv_io.h"

namespace pared {

void conv_strips_nchw__neon(const ConvStripArgs& a) { pack_strips<NeonConv>(a); }

}  // namespace pared
