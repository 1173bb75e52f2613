#include "kernels/generic/dequantize.h"

namespace pared {

void dequantize_store_rows__avx512(const DequantizeArgs& a) { dequantize_rows<Avx512Io>(a); }

}  // namespace pared
