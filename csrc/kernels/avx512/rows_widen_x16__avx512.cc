#include "kernels/generic/rows_io.h"

namespace pared {

void rows_widen_x16__avx512(const RowsWidenArgs& a) { widen_rows<Avx512Io>(a); }

}  // namespace pared
