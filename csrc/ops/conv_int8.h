// conv2d with dense int8 weights.
#pragma once

#include "formats/int8.h"
#include "ops/conv.h"

namespace pared {

// y = activation(float(sum of (u - zero) q) * s * scale_w + bias), rounded after each operation, the sum
// exact in int32, u and s as ConvFrame::quantize gives them with the weight's range of activations; padding
// is `zero`. An image that holds an infinity or a NaN gives NaN in all of its outputs.
void conv2d_int8(const ConvArgs& args, const Int8Packed& w);

}  // namespace pared
