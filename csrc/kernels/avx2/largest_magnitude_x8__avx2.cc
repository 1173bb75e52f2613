#include "kernels/generic/quantize.h"

namespace pared {

void largest_magnitude_x8__avx2(const MagnitudeArgs& a) { magnitude<Avx2Bytes>(a); }

}  // namespace pared
