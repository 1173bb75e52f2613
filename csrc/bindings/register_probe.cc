// The machine's ceilings, for bench/roofline.py.
#include "bindings/register.h"
#include "core/check.h"
#include "ops/machine_probe.h"

namespace pared {
namespace {

MachineProbe parse_probe(const std::string& name) {
  if (name == "fma") return MachineProbe::fma;
  if (name == "load") return MachineProbe::load;
  if (name == "store") return MachineProbe::store;
  if (name == "panel") return MachineProbe::panel;
  if (name == "dot8") return MachineProbe::dot8;
  throw ValueError(str("probe: expected one of fma, load, store, panel, dot8, got '", name, "'"));
}

}  // namespace

void register_probe(py::module_& m) {
  m.def(
      "machine_probe",
      [](const std::string& probe, int64_t bytes, int64_t repeats, int threads, bool huge_pages) {
        const MachineProbe which = parse_probe(probe);
        MachineProbeResult r;
        {
          py::gil_scoped_release unlocked;
          r = run_machine_probe(which, bytes, repeats, threads, huge_pages);
        }
        return py::make_tuple(r.seconds, r.elements, r.done);
      },
      py::arg("probe"), py::arg("bytes"), py::arg("repeats"), py::arg("threads") = 1,
      py::arg("huge_pages") = false);
  m.def(
      "clock_probe",
      [](int64_t steps) {
        ClockProbeResult r;
        {
          py::gil_scoped_release unlocked;
          r = run_clock_probe(steps);
        }
        return py::make_tuple(r.seconds, r.done);
      },
      py::arg("steps"));
}

}  // namespace pared
