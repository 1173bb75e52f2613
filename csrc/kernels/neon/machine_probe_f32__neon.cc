#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__neon(const MachineProbeArgs& a) { run_probe<NeonF32, NeonDot<NeonWideProducts>>(a); }

}  // namespace pared
