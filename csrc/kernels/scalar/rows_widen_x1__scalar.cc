#include "kernels/generic/rows_io.h"

namespace pared {

void rows_widen_x1__scalar(const RowsWidenArgs& a) { widen_rows<ScalarIo>(a); }

}  // namespace pared
