#include "kernels/generic/conv_io.h"

namespace pared {

void conv_places_nchw__avx512(const ConvPlacesArgs& a) { place_entries<Avx512Conv>(a); }

}  // namespace pared
