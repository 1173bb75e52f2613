// y = activation(x W^T + bias) with a weight of masks and packed values, for few tokens.
#pragma once

#include "formats/bitmap.h"
#include "formats/pair.h"
#include "ops/linear.h"

namespace pared {

// Any number of tokens; more than kBitmapMaxTokens go in batches, each of which reads the weight.
void linear_bitmap(const LinearArgs& args, const BitmapPacked& w);
void linear_pair(const LinearArgs& args, const PairPacked& w);

}  // namespace pared
