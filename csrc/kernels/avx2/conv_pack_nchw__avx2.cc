#include "kernels/generic/conv_io.h"

namespace pared {

void conv_pack_nchw__avx2(const ConvPackArgs& a) { pack_conv<Avx2Conv>(a); }

}  // namespace pared
