#include "kernels/generic/conv_io.h"

namespace pared {

void conv_pack_nchw__scalar(const ConvPackArgs& a) { pack_conv<ScalarConv>(a); }

}  // namespace pared
