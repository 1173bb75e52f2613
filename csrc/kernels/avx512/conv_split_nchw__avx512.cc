#include "kernels/generic/conv_io.h"

namespace pared {

void conv_split_nchw__avx512(const ConvSplitArgs& a) { split_conv<Avx512Conv>(a); }

}  // namespace pared
