#include "kernels/generic/conv_io.h"

namespace pared {

void conv_store_nchw__avx2(const ConvStoreArgs& a) { store_conv<Avx2Conv>(a); }

}  // namespace pared
