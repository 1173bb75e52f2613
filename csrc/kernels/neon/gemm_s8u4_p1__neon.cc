#include "kernels/generic/gemm_s8u4.h"

namespace pared {

void gemm_s8u4_p1__neon(const Int4Args& a) { gemm_s8u4_run<NeonWideNibbles, NeonIo>(a); }

}  // namespace pared
