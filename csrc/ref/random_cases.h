// Many tiny random problems in one call: every operation at the level in force against plain loops over
// integers. Operands are integers, and scales powers of two, small enough that no sum is rounded in any order
// or format: every output has one right value. What rounding may do is for the tests of each operation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pared {

// The operations: csr, bsr, dense, chain, bitmap, pair, int8, bitmap8, bsr8, int4, gemm_s8, conv_csr,
// conv_int8, conv_bsr8, selection.
const std::vector<std::string>& random_families();

struct RandomCases {
  int64_t failed = 0;
  uint64_t seed = 0;  // of the first case that failed: alone, it fails again
  std::string what;   // and what was wrong with it
};

// Runs the cases of seeds [seed, seed + cases). fault: the reference works with one operand changed, which a
// case has to notice wherever that operand counts. Throws ValueError for an unknown family.
RandomCases run_random_cases(const std::string& family, uint64_t seed, int64_t cases, bool fault);

}  // namespace pared
