#include "kernels/generic/quantize.h"

namespace pared {

void quantize_u8_rows__scalar(const QuantizeArgs& a) { quantize_rows<ScalarBytes>(a); }

}  // namespace pared
