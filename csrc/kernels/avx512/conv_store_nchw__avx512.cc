#include "kernels/generic/conv_io.h"

namespace pared {

void conv_store_nchw__avx512(const ConvStoreArgs& a) { store_conv<Avx512Conv>(a); }

}  // namespace pared
