#include "kernels/generic/conv_io.h"

namespace pared {

void conv_split_nchw__scalar(const ConvSplitArgs& a) { split_conv<ScalarConv>(a); }

}  // namespace pared
