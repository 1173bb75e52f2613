#include "ops/layer_norm.h"

#include <algorithm>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {
namespace {

// Below this many elements (10 us) a second thread does not pay.
constexpr int64_t kMinElementsPerThread = 1 << 15;
constexpr size_t kRowPadding = 64;  // elements: the widest step of a kernel

void* row_at(void* rows, int64_t r, int64_t stride, DType dtype) {
  return rows ? static_cast<char*>(rows) + r * stride * dtype_size(dtype) : nullptr;
}
const void* row_at(const void* rows, int64_t r, int64_t stride, DType dtype) {
  return row_at(const_cast<void*>(rows), r, stride, dtype);
}

}  // namespace

void normalise(const LayerNormArgs& args) {
  if (args.rows * args.cols == 0) return;
  const auto kernel = kernel_for<layer_norm>(active_isa()).fn;
  const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / args.cols);
  parallel_for(0, args.rows, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory;
    LayerNormArgs a = args;
    a.row = memory.get<float>(round_up(args.cols, kRowPadding));
    a.rows = end - begin;
    a.x = row_at(args.x, begin, args.x_stride, args.dtype);
    a.residual = row_at(args.residual, begin, args.residual_stride, args.dtype);
    a.sum = row_at(args.sum, begin, args.sum_stride, args.dtype);
    a.y = row_at(args.y, begin, args.y_stride, args.dtype);
    kernel(a);
  });
}

}  // namespace pared
