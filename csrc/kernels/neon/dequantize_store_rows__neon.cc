#include "kernels/generic/dequantize.h"

namespace pared {

void dequantize_store_rows__neon(const DequantizeArgs& a) { dequantize_rows<NeonIo>(a); }

}  // namespace pared
