// The specification of conv2d: scalar, double, one term after the other.
#pragma once

#include <cstdint>

namespace pared {

struct ConvReference {
  const double* x;     // [images, channels, height, width]
  const double* w;     // [filters, channels / groups, kh, kw]
  const double* bias;  // [filters] or null
  double* y;           // [images, filters, out_h, out_w]
  int64_t images, channels, height, width, filters, groups, kh, kw;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, out_h, out_w;
};

// A zero weight contributes nothing, whatever the input holds: 0 * inf is skipped, as sparse kernels do.
void conv2d_reference(const ConvReference& a);

}  // namespace pared
