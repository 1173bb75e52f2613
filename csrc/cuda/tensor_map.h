// Matrices that the copy engine of sm_90 reads as boxes of 128 bytes by some rows, swizzled on the way for
// wgmma.
#pragma once

#include <cuda.h>  // for the type; nothing of the driver is linked

#include <cstdint>

namespace pared::cuda {

// Rows of `row_bytes` that begin `stride` bytes apart; boxes of `box_rows` (at most 256) of them. Base and
// stride are multiples of 16. The driver writes it, which is found at run time; throws std::runtime_error
// that begins with `what`.
CUtensorMap tensor_map(const void* base, int64_t row_bytes, int64_t rows, int64_t stride, int box_rows,
                       const char* what);

}  // namespace pared::cuda
