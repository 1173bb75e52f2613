#include "kernels/generic/quantize.h"

namespace pared {

void quantize_u8_rows__avx512(const QuantizeArgs& a) { quantize_rows<Avx512Bytes>(a); }

}  // namespace pared
