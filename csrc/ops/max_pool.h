// Max pooling of images in channel planes.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace pared {

// Planes [height, width] contiguous; strides in elements.
struct PoolImages {
  MaxPoolArgs plane;  // of the first image and channel; the scratch is filled in here
  int64_t images, channels;
  int64_t image_stride, channel_stride;
};

void max_pool2d(const PoolImages& args);

}  // namespace pared
