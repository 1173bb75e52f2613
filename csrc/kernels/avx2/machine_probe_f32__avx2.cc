#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__avx2(const MachineProbeArgs& a) { run_probe<Avx2F32, Avx2Dot>(a); }

}  // namespace pared
