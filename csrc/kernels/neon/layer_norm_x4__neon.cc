#include "kernels/generic/layer_norm.h"

namespace pared {

void layer_norm_x4__neon(const LayerNormArgs& a) { normalise_rows<NeonIo>(a); }

}  // namespace pared
