#include "kernels/generic/gemm_s8u4.h"

namespace pared {

void gemm_s8u4_p1__avx2(const Int4Args& a) { gemm_s8u4_run<Avx2Nibbles, Avx2Io>(a); }

}  // namespace pared
