// y = activation(x W^T + bias) with a packed weight: chooses kernel, tiles and threads.
#pragma once

#include <cstdint>

#include "formats/csr.h"
#include "kernels/types.h"

namespace pared {

struct LinearArgs {
  const void* x;  // [tokens, cols], unit stride along cols
  int64_t x_stride;
  int64_t tokens;
  DType dtype;        // of x and y: f32, f16, bf16
  const float* bias;  // [rows] or null
  Activation activation;
  void* y;  // [tokens, rows], unit stride along rows
  int64_t y_stride;
};

void linear_csr(const LinearArgs& args, const CsrPacked& w);

}  // namespace pared
