#include "kernels/generic/conv_io.h"

namespace pared {

void conv_strips_nchw__avx512(const ConvStripArgs& a) { pack_strips<Avx512Conv>(a); }

}  // namespace pared
