// The packed formats, one line each in formats.cc: what can be done with a buffer of any of them.
#pragma once

#include <cstdint>

#include "formats/packed.h"

namespace pared {

struct PackedFormat {
  PackedKind kind;
  const char* name;  // as in pared.ops
  // Cheap, header only; throws ValueError. The others throw it too.
  void (*check)(const uint8_t* data, int64_t bytes);
  // Every invariant and the checksum.
  void (*validate)(const uint8_t* data, int64_t bytes);
  // Validates, then writes the weight as the user knows it, [rows, dense_cols], contiguous, f32, f16 or bf16.
  void (*unpack_dense)(const uint8_t* data, int64_t bytes, DType dtype, void* out);
};

// The format that a buffer's header names, the header checked; throws ValueError.
const PackedFormat& format_of(const uint8_t* data, int64_t bytes);

// Columns of the weight as the user knows it: of one group for a convolution.
int64_t dense_cols(const PackedHeader& h);

}  // namespace pared
