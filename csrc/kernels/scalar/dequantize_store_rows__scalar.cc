#include "kernels/generic/dequantize.h"

namespace pared {

void dequantize_store_rows__scalar(const DequantizeArgs& a) { dequantize_rows<ScalarIo>(a); }

}  // namespace pared
