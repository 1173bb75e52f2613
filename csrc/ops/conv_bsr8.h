// conv2d with int8 block weights.
#pragma once

#include "formats/bsr8.h"
#include "ops/conv.h"

namespace pared {

// Each image is quantised with one scale: s = max|x| / 127, u = clamp(round(x * (1 / s)), -127, 127) + 128,
// to the nearest even integer; y = activation(float(sum of q_x q_w) * (scale_w * s) + bias), the sum exact in
// int32. An image that holds an infinity or a NaN gives NaN; one whose magnitudes are all below 2^-100 counts
// as zero.
void conv2d_bsr8(const ConvArgs& args, const Bsr8Packed& w);

}  // namespace pared
