#include "kernels/generic/gemm_s8u4.h"

namespace pared {

void gemm_s8u4_p1__neondot(const Int4Args& a) { gemm_s8u4_run<NeonSdotNibbles, NeonIo>(a); }

}  // namespace pared
