#include "kernels/generic/conv_io.h"

namespace pared {

void conv_places_nchw__avx2(const ConvPlacesArgs& a) { place_entries<Avx2Conv>(a); }

}  // namespace pared
