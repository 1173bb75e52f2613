// The int8 product on the tensor cores of sm_90: what the .cu files under wgmma/ define where CUTLASS was
// found.
#pragma once

#include "cuda/int8.h"
#include "cuda/int8_plan.h"

namespace pared::cuda::wgmma {

// As int8_product with scales; rows of y at multiples of 16 bytes. No workspace.
#define PARED_TILE(rows, columns, cost) \
  void int8_##rows##x##columns(const Int8Product& a, int device, cudaStream_t stream);
PARED_INT8_WGMMA_TILES(PARED_TILE)
#undef PARED_TILE

}  // namespace pared::cuda::wgmma
