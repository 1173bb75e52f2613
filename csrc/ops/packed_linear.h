// The linear operation of a packed weight, whatever its format.
#pragma once

#include <cstdint>
#include <functional>

#include "formats/packed.h"
#include "ops/linear.h"

namespace pared {

struct PackedLinear {
  const PackedHeader* header;
  std::function<void(const LinearArgs&)> run;
};

// Reads the header, as the view of each format does; throws ValueError for bytes that are no linear weight.
PackedLinear packed_linear(const uint8_t* data, int64_t bytes);

}  // namespace pared
