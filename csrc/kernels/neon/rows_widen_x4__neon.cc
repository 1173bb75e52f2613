#include "kernels/generic/rows_io.h"

namespace pared {

void rows_widen_x4__neon(const RowsWidenArgs& a) { widen_rows<NeonIo>(a); }

}  // namespace pared
