#include "kernels/generic/gemm_u8s8.h"

namespace pared {

extern const gemm_u8s8::Table gemm_u8s8_t6p4__avxvnni;
const gemm_u8s8::Table gemm_u8s8_t6p4__avxvnni = PARED_GEMM_TABLE(AvxVnniDot);

}  // namespace pared
