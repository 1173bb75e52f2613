#include "kernels/generic/gemm_s8u4.h"

namespace pared {

void gemm_s8u4_p1__avx512(const Int4Args& a) { gemm_s8u4_run<Avx512Nibbles, Avx512Io>(a); }

}  // namespace pared
