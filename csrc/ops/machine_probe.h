// Runs a machine probe on several threads at once, each with a buffer of its own.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace pared {

struct MachineProbeResult {
  double seconds;   // from the first thread's start to the last one's end
  double elements;  // floats that went through the loop, all threads together
  double done;      // steps of eight vectors that each thread reports; exact while below 2^24
};

// `bytes` a thread, rounded up to a multiple of 512; in huge pages, as weights are, if asked for. Throws
// ValueError on sizes below one.
MachineProbeResult run_machine_probe(MachineProbe probe, int64_t bytes, int64_t repeats, int threads,
                                     bool huge_pages = false);

struct ClockProbeResult {
  double seconds;
  uint64_t done;  // the number of steps, as the chain counted it
};

// Additions that wait for each other, one a cycle on any processor: how long its cycles are. Throws
// ValueError on no steps.
ClockProbeResult run_clock_probe(int64_t steps);

}  // namespace pared
