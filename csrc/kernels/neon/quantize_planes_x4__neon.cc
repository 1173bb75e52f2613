#include "kernels/generic/quantize.h"

namespace pared {

void quantize_planes_x4__neon(const QuantizePlanesArgs& a) { quantize_plane_words<NeonBytes>(a); }

}  // namespace pared
