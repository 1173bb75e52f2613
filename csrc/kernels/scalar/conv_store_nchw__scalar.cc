#include "kernels/generic/conv_io.h"

namespace pared {

void conv_store_nchw__scalar(const ConvStoreArgs& a) { store_conv<ScalarConv>(a); }

}  // namespace pared
