#include "kernels/generic/layer_norm.h"

namespace pared {

void layer_norm_x16__avx512(const LayerNormArgs& a) { normalise_rows<Avx512Io>(a); }

}  // namespace pared
