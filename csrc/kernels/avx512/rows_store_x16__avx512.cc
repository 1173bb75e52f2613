#include "kernels/generic/rows_io.h"

namespace pared {

void rows_store_x16__avx512(const RowsStoreArgs& a) { store_rows<Avx512Io>(a); }

}  // namespace pared
