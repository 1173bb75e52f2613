// y = activation(conv2d(x, w) + bias) with a packed weight: chooses the layout's way, kernels, tiles,
// threads.
#pragma once

#include <cstdint>

#include "formats/csr.h"
#include "kernels/types.h"

namespace pared {

enum class ImageLayout : uint8_t { nchw, nhwc };

// The kernel's size, the channels of a group and the groups are the packed weight's.
struct ConvArgs {
  // nchw: planes [height, width] contiguous. nhwc: channels contiguous, pixels `pixel_stride` apart
  // throughout.
  const void* x;
  DType dtype;  // of x and y: f32, f16, bf16
  ImageLayout layout;
  int64_t images, channels, height, width;
  int64_t image_stride;    // elements between images
  int64_t channel_stride;  // nchw alone: elements between channels
  int64_t pixel_stride;    // nhwc alone: elements between pixels
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int64_t out_h, out_w;
  const float* bias;  // [filters] or null
  Activation activation;
  void* y;               // contiguous in the same layout
  int64_t residual = 0;  // as in PanelStoreArgs
};

void conv2d_csr(const ConvArgs& args, const CsrPacked& w);

}  // namespace pared
