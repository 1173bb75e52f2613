// y = activation(x W^T + bias) with unstructured int8 weights, any number of tokens.
#pragma once

#include <vector>

#include "formats/bitmap8.h"
#include "ops/linear.h"

namespace pared {

// The same bits as linear_int8 with the same quantized weight.
void linear_bitmap8(const LinearArgs& args, const Bitmap8Packed& w);
bool share_inputs(const Bitmap8Packed& a, const Bitmap8Packed& b);
void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<Bitmap8Packed>>& outputs);

}  // namespace pared
