#include "kernels/generic/gemm_u8s8.h"

namespace pared {

extern const gemm_u8s8::Table gemm_u8s8_t6p4__avx2;
const gemm_u8s8::Table gemm_u8s8_t6p4__avx2 = PARED_GEMM_TABLE(Avx2Dot);

}  // namespace pared
