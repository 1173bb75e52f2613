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

// `bytes` a thread, rounded up to a multiple of 512. Throws ValueError on sizes below one.
MachineProbeResult run_machine_probe(MachineProbe probe, int64_t bytes, int64_t repeats, int threads);

}  // namespace pared
