#include "kernels/generic/rows_io.h"

namespace pared {

void rows_store_x8__avx2(const RowsStoreArgs& a) { store_rows<Avx2Io>(a); }

}  // namespace pared
