#include "kernels/generic/rows_io.h"

namespace pared {

void rows_widen_x8__avx2(const RowsWidenArgs& a) { widen_rows<Avx2Io>(a); }

}  // namespace pared
