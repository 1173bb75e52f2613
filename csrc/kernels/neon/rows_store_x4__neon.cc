#include "kernels/generic/rows_io.h"

namespace pared {

void rows_store_x4__neon(const RowsStoreArgs& a) { store_rows<NeonIo>(a); }

}  // namespace pared
