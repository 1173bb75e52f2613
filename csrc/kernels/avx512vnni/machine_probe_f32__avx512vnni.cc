#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__avx512vnni(const MachineProbeArgs& a) { run_probe<Avx512F32, VnniDot>(a); }

}  // namespace pared
