#include "kernels/generic/quantize.h"

namespace pared {

void quantize_u8_rows__avx2(const QuantizeArgs& a) { quantize_rows<Avx2Bytes>(a); }

}  // namespace pared
