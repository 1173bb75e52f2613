#include "ops/max_pool.h"

#include <algorithm>
#include <limits>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {
namespace {

// Below this many elements to a thread, a second one does not pay.
constexpr int64_t kGrain = int64_t{1} << 15;

}  // namespace

void max_pool2d(const PoolImages& p) {
  const MaxPoolArgs& a = p.plane;
  const int64_t outputs = a.out_h * a.out_w, element = dtype_size(a.dtype);
  if (p.images * p.channels * outputs == 0) return;
  const auto kernel = kernel_for<max_pool>(active_isa()).fn;
  const auto left = static_cast<int64_t>(round_up(a.pad_left, kPanelGroup));
  const int64_t reach = (a.out_w - 1) * a.stride_w - a.pad_left + (a.kernel_w - 1) * a.dilation_w + 1;
  const auto row = left + static_cast<int64_t>(round_up(std::max(a.width, reach), kPanelGroup));
  const int64_t grain = std::max<int64_t>(1, kGrain / (a.height * a.width));
  parallel_for(0, p.images * p.channels, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    float* scratch = memory.get<float>(kMaxPoolRows * row);
    std::fill(scratch, scratch + kMaxPoolRows * row, -std::numeric_limits<float>::infinity());
    MaxPoolArgs one = a;
    one.rows = scratch + left;
    one.row_stride = row;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i / p.channels * p.image_stride + i % p.channels * p.channel_stride;
      one.x = static_cast<const char*>(a.x) + at * element;
      one.y = static_cast<char*>(a.y) + i * outputs * element;
      kernel(one);
    }
  });
}

}  // namespace pared
