#include "kernels/generic/quantize.h"

namespace pared {

void largest_magnitude_x16__avx512(const MagnitudeArgs& a) { magnitude<Avx512Bytes>(a); }

}  // namespace pared
