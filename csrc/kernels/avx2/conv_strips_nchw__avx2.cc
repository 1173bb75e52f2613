#include "kernels/generic/conv_io.h"

namespace pared {

void conv_strips_nchw__avx2(const ConvStripArgs& a) { pack_strips<Avx2Conv>(a); }

}  // namespace pared
