#include "kernels/generic/gemm_u8s8.h"

namespace pared {

extern const gemm_u8s8::Table gemm_u8s8_t6p4__avx512;
const gemm_u8s8::Table gemm_u8s8_t6p4__avx512 = PARED_GEMM_TABLE(Avx512Dot);

}  // namespace pared
