// The linear operation on 4-bit weights, tokens quantized to 8 bits on the way in.
#pragma once

#include "formats/int4.h"
#include "ops/linear.h"

namespace pared {

void linear_int4(const LinearArgs& args, const Int4Packed& w);

}  // namespace pared
