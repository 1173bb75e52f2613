#include "kernels/generic/quantize.h"

namespace pared {

void largest_magnitude_x1__scalar(const MagnitudeArgs& a) { magnitude<ScalarBytes>(a); }

}  // namespace pared
