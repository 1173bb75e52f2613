#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__scalar(const MachineProbeArgs& a) { run_probe<ScalarF32, ScalarDot>(a); }

}  // namespace pared
