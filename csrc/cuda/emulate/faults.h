// Kernels with the faults that the emulator is there to find, conflicts of banks among them. For its own
// tests.
#pragma once

#include <string>
#include <vector>

namespace pared::cuda::emulate {

std::vector<std::string> fault_names();
// Runs the kernel on a scratch buffer and returns what it wrote: 64 words that started as 0.
std::vector<unsigned> run_fault(const std::string& name);

}  // namespace pared::cuda::emulate
