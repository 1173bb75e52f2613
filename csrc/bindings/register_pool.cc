// Max pooling on plain arrays.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings/array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "ops/max_pool.h"

namespace pared {
namespace {

using Pair = std::array<int64_t, 2>;

// The number of windows along an axis, as torch counts them: with `ceil`, one more that begins within the
// input or its padding before, where there is one. Checks the axis.
int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool ceil) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // no sum below overflows
  PARED_CHECK(kernel >= 1 && kernel < kLimit, "kernel_size: expected positive values, got ", kernel);
  PARED_CHECK(stride >= 1 && stride < kLimit, "stride: expected positive values, got ", stride);
  PARED_CHECK(dilation >= 1 && dilation < kLimit, "dilation: expected positive values, got ", dilation);
  const int64_t span = dilation * (kernel - 1) + 1;
  PARED_CHECK(pad >= 0 && pad <= span / 2, "padding: expected 0 to half of the dilated kernel's ", span,
              ", got ", pad);
  const int64_t free = size + 2 * pad - span;
  PARED_CHECK(size > 0 && free >= 0, "x: expected a padded size of at least the dilated kernel's ", span,
              ", got ", size + 2 * pad);
  const int64_t n = free / stride + 1;
  return n + (ceil && free % stride != 0 && n * stride < size + pad);
}

struct Pool {
  Pair kernel, stride, padding, dilation;
  bool ceil;
  int64_t windows_of(int axis, int64_t size) const {
    return windows(size, kernel[axis], stride[axis], padding[axis], dilation[axis], ceil);
  }
};

}  // namespace

void register_pool(py::module_& m) {
  m.def(
      "max_pool2d_output_size",
      [](int64_t height, int64_t width, const Pair& kernel, const Pair& stride, const Pair& padding,
         const Pair& dilation, bool ceil) {
        const Pool pool{kernel, stride, padding, dilation, ceil};
        return py::make_tuple(pool.windows_of(0, height), pool.windows_of(1, width));
      },
      py::arg("height"), py::arg("width"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("ceil"));

  m.def(
      "max_pool2d",
      [](py::handle x, py::handle out, const Pair& kernel, const Pair& stride, const Pair& padding,
         const Pair& dilation, bool ceil) {
        const Array ax = parse_array(x, "x"), ay = parse_array(out, "out");
        require_dtype(ax, {DType::f32, DType::f16, DType::bf16});
        require_dtype(ay, {ax.dtype});
        require_writable(ay);
        require_contiguous(ay);
        require_shape(ax, {-1, -1, -1, -1});
        const Pool pool{kernel, stride, padding, dilation, ceil};
        const int64_t height = ax.shape[2], width = ax.shape[3];
        const int64_t out_h = pool.windows_of(0, height), out_w = pool.windows_of(1, width);
        require_shape(ay, {ax.shape[0], ax.shape[1], out_h, out_w});
        PARED_CHECK(
            ax.size() == 0 || ((width == 1 || ax.strides[3] == 1) && (height == 1 || ax.strides[2] == width)),
            "x: expected contiguous planes, got other strides; ", ax.copy_hint());
        require_disjoint(ay, ax);
        PoolImages args{};
        MaxPoolArgs& p = args.plane;
        p.x = ax.data, p.y = ay.data, p.dtype = ax.dtype;
        p.height = height, p.width = width, p.out_h = out_h, p.out_w = out_w;
        p.kernel_h = kernel[0], p.kernel_w = kernel[1];
        p.stride_h = stride[0], p.stride_w = stride[1];
        p.pad_top = padding[0], p.pad_left = padding[1];
        p.dilation_h = dilation[0], p.dilation_w = dilation[1];
        args.images = ax.shape[0];
        args.channels = ax.shape[1];
        args.image_stride = ax.strides[0];
        args.channel_stride = ax.strides[1];
        py::gil_scoped_release unlocked;
        max_pool2d(args);
      },
      py::arg("x"), py::arg("out"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("ceil") = false);
}

}  // namespace pared
