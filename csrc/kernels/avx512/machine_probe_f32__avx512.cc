#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__avx512(const MachineProbeArgs& a) { run_probe<Avx512F32, Avx512Dot>(a); }

}  // namespace pared
