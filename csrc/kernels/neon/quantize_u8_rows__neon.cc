#include "kernels/generic/quantize.h"

namespace pared {

void quantize_u8_rows__neon(const QuantizeArgs& a) { quantize_rows<NeonBytes>(a); }

}  // namespace pared
