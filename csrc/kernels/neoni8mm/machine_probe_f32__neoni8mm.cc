#include "kernels/generic/machine_probe.h"

namespace pared {

void machine_probe_f32__neoni8mm(const MachineProbeArgs& a) {
  run_probe<NeonF32, NeonDot<NeonUsdotProducts>>(a);
}

}  // namespace pared
