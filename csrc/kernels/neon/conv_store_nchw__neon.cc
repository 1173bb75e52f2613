#include "kernels/generic/conv_io.h"

namespace pared {

void conv_store_nchw__neon(const ConvStoreArgs& a) { store_conv<NeonConv>(a); }

}  // namespace pared
