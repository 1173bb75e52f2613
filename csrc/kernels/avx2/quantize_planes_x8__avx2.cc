#include "kernels/generic/quantize.h"

namespace pared {

void quantize_planes_x8__avx2(const QuantizePlanesArgs& a) { quantize_plane_words<Avx2Bytes>(a); }

}  // namespace pared
