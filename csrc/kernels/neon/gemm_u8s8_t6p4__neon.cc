#include "kernels/generic/gemm_u8s8.h"

namespace pared {

#define PARED_TILE(T, P) gemm_u8s8_lanes<NeonWideProducts, T, P>
extern const gemm_u8s8::Table gemm_u8s8_t6p4__neon;
const gemm_u8s8::Table gemm_u8s8_t6p4__neon = PARED_GEMM_TILES(PARED_TILE);

}  // namespace pared
