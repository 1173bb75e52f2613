#include "kernels/generic/csr_panel.h"

namespace pared {

extern const csr_panel_f32::Table csr_panel_f32_m128__avx512;
const csr_panel_f32::Table csr_panel_f32_m128__avx512 = {csr_panel_one<8>,
                                                         csr_panel_two<4>,
                                                         csr_panel_rows<Avx512F32, 3, 4>,
                                                         csr_panel_rows<Avx512F32, 4, 2>,
                                                         csr_panel_rows<Avx512F32, 5, 2>,
                                                         csr_panel_rows<Avx512F32, 6, 1>,
                                                         csr_panel_rows<Avx512F32, 7, 1>,
                                                         csr_panel_rows<Avx512F32, 8, 1>};

}  // namespace pared
