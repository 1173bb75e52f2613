// y = activation(x W^T + bias) with unstructured int8 weights, any number of tokens.
#pragma once

#include "formats/bitmap8.h"
#include "ops/linear.h"

namespace pared {

// The same bits as linear_int8 with the same quantized weight.
void linear_bitmap8(const LinearArgs& args, const Bitmap8Packed& w);

}  // namespace pared
