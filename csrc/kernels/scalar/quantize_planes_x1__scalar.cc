#include "kernels/generic/quantize.h"

namespace pared {

void quantize_planes_x1__scalar(const QuantizePlanesArgs& a) { quantize_plane_words<ScalarBytes>(a); }

}  // namespace pared
