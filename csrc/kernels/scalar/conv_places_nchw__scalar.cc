#include "kernels/generic/conv_io.h"

namespace pared {

void conv_places_nchw__scalar(const ConvPlacesArgs& a) { place_entries<ScalarConv>(a); }

}  // namespace pared
