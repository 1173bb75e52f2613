#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__avxvnni(const MachineProbeArgs& a) { run_probe<Avx2F32, AvxVnniDot>(a); }

}  // namespace pared
