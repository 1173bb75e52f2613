// The int8 product on the tensor cores of sm_90: what the .cu files under wgmma/ define where CUTLASS was
// found.
#pragma once

#include "cuda/int8.h"

namespace pared::cuda::wgmma {

// As int8_product with scales; rows of y at multiples of 16 bytes. No workspace.
void int8_64x128(const Int8Product& a, int device, cudaStream_t stream);
void int8_128x128(const Int8Product& a, int device, cudaStream_t stream);
void int8_128x256(const Int8Product& a, int device, cudaStream_t stream);

}  // namespace pared::cuda::wgmma
