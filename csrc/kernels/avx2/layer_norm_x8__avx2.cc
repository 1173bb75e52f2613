#include "kernels/generic/layer_norm.h"

namespace pared {

void layer_norm_x8__avx2(const LayerNormArgs& a) { normalise_rows<Avx2Io>(a); }

}  // namespace pared
