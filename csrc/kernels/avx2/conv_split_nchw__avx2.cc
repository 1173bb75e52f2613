#include "kernels/generic/conv_io.h"

namespace pared {

void conv_split_nchw__avx2(const ConvSplitArgs& a) { split_conv<Avx2Conv>(a); }

}  // namespace pared
