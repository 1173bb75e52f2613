#include "kernels/generic/quantize.h"

namespace pared {

void largest_magnitude_x4__neon(const MagnitudeArgs& a) { magnitude<NeonBytes>(a); }

}  // namespace pared
