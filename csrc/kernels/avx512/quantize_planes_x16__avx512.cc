#include "kernels/generic/quantize.h"

namespace pared {

void quantize_planes_x16__avx512(const QuantizePlanesArgs& a) { quantize_plane_words<Avx512Bytes>(a); }

}  // namespace pared
