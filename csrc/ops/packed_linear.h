// The linear operation of a packed weight, whatever its format: the one place that knows them all.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "formats/bitmap.h"
#include "formats/bitmap8.h"
#include "formats/bsr8.h"
#include "formats/csr.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/pair.h"
#include "ops/linear.h"

namespace pared {

// CsrPacked: csr, bsr and dense.
using LinearWeight =
    std::variant<CsrPacked, BitmapPacked, PairPacked, Int8Packed, Bitmap8Packed, Bsr8Packed, Int4Packed>;

// Reads the header, as the view of each format does; throws ValueError for bytes that are no linear weight.
LinearWeight view_linear(const uint8_t* data, int64_t bytes);
const PackedHeader& header_of(const LinearWeight& w);

void linear(const LinearArgs& args, const LinearWeight& w);

// As of each format; false where a format has no such call, with itself too.
bool share_inputs(const LinearWeight& a, const LinearWeight& b);
// For one weight, or for several each of which shares its inputs with the first.
void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<LinearWeight>>& outputs);

}  // namespace pared
