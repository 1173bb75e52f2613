#include "kernels/generic/conv_io.h"

namespace pared {

void conv_pack_nchw__avx512(const ConvPackArgs& a) { pack_conv<Avx512Conv>(a); }

}  // namespace pared
