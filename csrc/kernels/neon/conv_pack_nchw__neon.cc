#include "kernels/generic/conv_io.h"

namespace pared {

void conv_pack_nchw__neon(const ConvPackArgs& a) { pack_conv<NeonConv>(a); }

}  // namespace pared
