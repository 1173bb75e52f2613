#include "kernels/generic/conv_io.h"

namespace pared {

void conv_split_nchw__neon(const ConvSplitArgs& a) { split_conv<NeonConv>(a); }

}  // namespace pared
