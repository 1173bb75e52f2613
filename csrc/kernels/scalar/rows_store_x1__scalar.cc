#include "kernels/generic/rows_io.h"

namespace pared {

void rows_store_x1__scalar(const RowsStoreArgs& a) { store_rows<ScalarIo>(a); }

}  // namespace pared
