#include "kernels/generic/layer_norm.h"

namespace pared {

void layer_norm_x1__scalar(const LayerNormArgs& a) { normalise_rows<ScalarIo>(a); }

}  // namespace pared
