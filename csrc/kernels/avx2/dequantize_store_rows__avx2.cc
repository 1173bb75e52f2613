#include "kernels/generic/dequantize.h"

namespace pared {

void dequantize_store_rows__avx2(const DequantizeArgs& a) { dequantize_rows<Avx2Io>(a); }

}  // namespace pared
