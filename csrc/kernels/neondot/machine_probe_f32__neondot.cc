#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__neondot(const MachineProbeArgs& a) {
  run_probe<NeonF32, NeonDot<NeonUdotProducts>>(a);
}

}  // namespace pared
