#include "kernels/generic/gemm_u8s8.h"

namespace pared {

#define PARED_TILE(T, P) gemm_u8s8_lanes<NeonUdotProducts, T, P>
extern const gemm_u8s8::Table gemm_u8s8_t6p4__neondot;
const gemm_u8s8::Table gemm_u8s8_t6p4__neondot = PARED_GEMM_TILES(PARED_TILE);

}  // namespace pared
