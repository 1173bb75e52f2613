// conv2d on packed weights, and its reference.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <utility>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/formats.h"
#include "ops/conv.h"
#include "ops/conv_bsr8.h"
#include "ops/conv_int8.h"
#include "ref/conv.h"

namespace pared {
namespace {

using Pair = std::array<int64_t, 2>;
using Padding = std::array<int64_t, 4>;  // top, bottom, left, right

struct Frame {
  int64_t out_h, out_w;
};

// Validates stride, padding and dilation against the sizes; the output's height and width.
Frame output_frame(int64_t height, int64_t width, int64_t kh, int64_t kw, const Pair& stride,
                   const Padding& pad, const Pair& dilation) {
  // Far beyond any image, and small enough that no sum below overflows.
  constexpr int64_t kLimit = int64_t{1} << 31;
  for (int64_t s : stride)
    PARED_CHECK(s >= 1 && s < kLimit, "stride: expected positive values, got (", stride[0], ", ", stride[1],
                ")");
  for (int64_t d : dilation)
    PARED_CHECK(d >= 1 && d < kLimit, "dilation: expected positive values, got (", dilation[0], ", ",
                dilation[1], ")");
  for (int64_t p : pad) PARED_CHECK(p >= 0 && p < kLimit, "padding: expected non-negative values, got ", p);
  const int64_t span_h = dilation[0] * (kh - 1) + 1, span_w = dilation[1] * (kw - 1) + 1;
  const int64_t padded_h = height + pad[0] + pad[1], padded_w = width + pad[2] + pad[3];
  PARED_CHECK(height > 0 && width > 0 && padded_h >= span_h && padded_w >= span_w,
              "x: expected a padded size of at least the dilated kernel's ", span_h, "x", span_w, ", got ",
              padded_h, "x", padded_w);
  return {(padded_h - span_h) / stride[0] + 1, (padded_w - span_w) / stride[1] + 1};
}

// Strides of size-1 axes say nothing.
bool stride_is(const Array& a, int axis, int64_t want) {
  return a.shape[axis] == 1 || a.strides[axis] == want;
}

bool is_nchw(const Array& a) { return stride_is(a, 3, 1) && stride_is(a, 2, a.shape[3]); }

// The distance between pixels when channels are innermost and pixels evenly spaced, else 0.
int64_t nhwc_pixel_stride(const Array& a) {
  const int64_t c = a.shape[1], h = a.shape[2], w = a.shape[3];
  if (!stride_is(a, 1, 1)) return 0;
  const int64_t pixel = w > 1 ? a.strides[3] : h > 1 ? a.strides[2] : a.shape[0] > 1 ? a.strides[0] : c;
  return pixel >= c && stride_is(a, 2, w * pixel) ? pixel : 0;
}

// Which layout the input is read in; an image of which both are true goes the output's way.
ImageLayout layout_of(const Array& x, const Array& y) {
  const bool y_nchw = y.contiguous();
  const bool y_nhwc = stride_is(y, 1, 1) && nhwc_pixel_stride(y) == y.shape[1] &&
                      stride_is(y, 0, y.shape[1] * y.shape[2] * y.shape[3]);
  PARED_CHECK(y_nchw || y_nhwc, "out: expected contiguous or channels-last memory");
  const bool x_nchw = is_nchw(x), x_nhwc = nhwc_pixel_stride(x) > 0;
  PARED_CHECK(x_nchw || x_nhwc, "x: expected contiguous planes or channels-last memory, got other strides; ",
              x.copy_hint());
  // One pixel an image, in and out, is a row of tokens: the same memory, and the pixels' way is the faster.
  const bool pixels = x.shape[2] * x.shape[3] == 1 && y.shape[2] * y.shape[3] == 1;
  if (x_nhwc && y_nhwc && (pixels || !(x_nchw && y_nchw))) return ImageLayout::nhwc;
  PARED_CHECK(x_nchw && y_nchw, "out: expected the memory layout of x");
  return ImageLayout::nchw;
}

// Bytes from `out` to what is added to it before the activation; 0 for None.
int64_t parse_residual(py::handle residual, const Array& out) {
  if (residual.is_none()) return 0;
  const Array a = parse_array(residual, "residual");
  require_dtype(a, {out.dtype});
  require_shape(a, {out.shape[0], out.shape[1], out.shape[2], out.shape[3]});
  for (int i = 0; i < 4; ++i)
    PARED_CHECK(out.size() == 0 || stride_is(a, i, out.strides[i]),
                "residual: expected the memory layout of the output, which is that of x");
  require_disjoint(out, a);
  return static_cast<const char*>(a.data) - static_cast<const char*>(out.data);
}

// The arguments of a convolution of `ax` with the weight `packed`, which has header `h`; checks them against
// each other. No images where there is nothing to compute. The views borrow.
ConvArgs parse_conv(const Array& ax, const Array& packed, const PackedHeader& h, py::handle bias,
                    const Array& ay, const Pair& stride, const Padding& padding, const Pair& dilation,
                    Activation activation, py::handle residual) {
  require_dtype(ax, kFloatTypes);
  require_dtype(ay, {ax.dtype});
  require_writable(ay);
  require_shape(ax, {-1, static_cast<int64_t>(h.channels) * h.groups, -1, -1});
  const Frame frame = output_frame(ax.shape[2], ax.shape[3], h.kh, h.kw, stride, padding, dilation);
  require_shape(ay, {ax.shape[0], h.rows, frame.out_h, frame.out_w});
  require_disjoint(ay, ax);
  require_disjoint(ay, packed);
  ConvArgs args{};
  args.x = ax.data;
  args.dtype = ax.dtype;
  args.images = ax.shape[0];
  args.channels = ax.shape[1];
  args.height = ax.shape[2];
  args.width = ax.shape[3];
  args.stride_h = stride[0];
  args.stride_w = stride[1];
  args.pad_top = padding[0];
  args.pad_left = padding[2];
  args.dilation_h = dilation[0];
  args.dilation_w = dilation[1];
  args.out_h = frame.out_h;
  args.out_w = frame.out_w;
  args.activation = activation;
  args.y = ay.data;
  args.bias = parse_bias(bias, h.rows, &ay);
  args.residual = parse_residual(residual, ay);
  if (ay.size() == 0) {
    args.images = 0;
    return args;
  }
  args.layout = layout_of(ax, ay);
  args.image_stride = ax.strides[0];
  args.channel_stride = ax.strides[1];
  args.pixel_stride = nhwc_pixel_stride(ax);
  return args;
}

// Ints from `least` on, one for all or one for each of 2, or of 4; bools and what else is an int to Python
// are not.
template <size_t N>
bool ints_of(py::handle given, long least, std::array<int64_t, N>& to) {
  const auto one = [&](PyObject* o, int64_t& v) {
    if (!PyLong_CheckExact(o)) return false;
    int overflow = 0;
    v = PyLong_AsLongLongAndOverflow(o, &overflow);
    return overflow == 0 && v >= least && v < int64_t{1} << 31;
  };
  if (!PyTuple_CheckExact(given.ptr())) {
    if (!one(given.ptr(), to[0])) return false;
    to.fill(to[0]);
    return true;
  }
  const size_t n = static_cast<size_t>(PyTuple_GET_SIZE(given.ptr()));
  if (n != N && n != 2) return false;
  std::array<int64_t, N> v;
  for (size_t i = 0; i < n; ++i)
    if (!one(PyTuple_GET_ITEM(given.ptr(), i), v[i])) return false;
  for (size_t i = 0; i < N; ++i) to[i] = v[n == N ? i : i / (N / 2)];
  return true;
}

// As ints_of; throws ValueError.
template <size_t N>
std::array<int64_t, N> require_ints(py::handle given, const char* name, long least) {
  std::array<int64_t, N> to{};
  PARED_CHECK(ints_of(given, least, to), name, ": expected an int or a tuple of 2", N == 4 ? " or 4" : "",
              " ints, each at least ", least, " and below 2**31, got ", py::repr(given).cast<std::string>());
  return to;
}

// Checks the arguments against the weight in `packed`, and computes: the one place that knows the formats.
void compute_conv2d(const Array& ax, const Array& packed, PackedKind kind, py::handle bias, const Array& ay,
                    const Pair& stride, const Padding& padding, const Pair& dilation, Activation activation,
                    py::handle residual) {
  const auto run = [&](auto* compute, const PackedHeader& h, const auto& w) {
    const ConvArgs args =
        parse_conv(ax, packed, h, bias, ay, stride, padding, dilation, activation, residual);
    py::gil_scoped_release unlocked;
    compute(args, w);
  };
  switch (kind) {
    case PackedKind::csr:
    case PackedKind::bsr:
    case PackedKind::dense: {
      const CsrPacked w = packed_csr(packed);
      return run(conv2d_csr, *w.header, w);
    }
    case PackedKind::bsr8: {
      const Bsr8Packed w = view_bsr8(packed_bytes(packed), packed.size());
      return run(conv2d_bsr8, *w.panel.header, w);
    }
    case PackedKind::int8: {
      const Int8Packed w = view_int8(packed_bytes(packed), packed.size());
      return run(conv2d_int8, *w.header, w);
    }
    default:
      throw ValueError(str("packed: expected a format with a conv2d kernel, got ",
                           format_of(packed_bytes(packed), packed.size()).name));
  }
}

// Into `out`, whatever the kind and memory layout of the arrays.
py::object conv2d_into(py::handle out, PyObject* const* args) {
  const Array ap = parse_array(args[1], "packed");
  const PackedHeader& h = checked_header(packed_bytes(ap), ap.size());
  PARED_CHECK(h.kh > 0, "packed: expected a convolution weight, got a linear one");
  const auto stride = require_ints<2>(args[3], "stride", 1);
  const auto padding = require_ints<4>(args[4], "padding", 0);
  const auto dilation = require_ints<2>(args[5], "dilation", 1);
  const py::handle groups = args[6];
  PARED_CHECK(groups.is_none() || require_ints<1>(groups, "groups", 1)[0] == h.groups, "groups: expected ",
              h.groups, ", as the weight was packed with, got ", py::repr(groups).cast<std::string>());
  refuse_grad({{args[0], "x"}, {args[2], "bias"}, {args[8], "residual"}});
  const Array ax = parse_array(args[0], "x"), ay = parse_array(out, "out");  // `out` was made like x
  compute_conv2d(ax, ap, h.kind, args[2], ay, stride, padding, dilation, activation_of(args[7]), args[8]);
  return py::reinterpret_borrow<py::object>(out);
}

// The commonest convolution, of contiguous tensors, in one call that makes its output; None for any other,
// and for arguments that Python has to look at.
py::object new_conv2d(PyObject* const* args) {
  const py::handle x = args[0], bias = args[2], groups = args[6], residual = args[8];
  Pair stride, dilation;
  Padding padding;
  if (!is_tensor(x) || !ints_of(args[3], 1, stride) || !ints_of(args[4], 0, padding) ||
      !ints_of(args[5], 1, dilation))
    return py::none();
  const Array ap = parse_array(args[1], "packed");
  const PackedHeader& h = checked_header(packed_bytes(ap), ap.size());
  std::array<int64_t, 1> g{h.groups};
  if (h.kh == 0 || (!groups.is_none() && (!ints_of(groups, 1, g) || g[0] != h.groups))) return py::none();
  refuse_grad({{x, "x"}, {bias, "bias"}, {residual, "residual"}});
  const Array ax = parse_array(x, "x");
  if (ax.ndim != 4 || !ax.contiguous() || ax.shape[1] != int64_t{h.channels} * h.groups) return py::none();
  const Frame frame = output_frame(ax.shape[2], ax.shape[3], h.kh, h.kw, stride, padding, dilation);
  const Activation activation = activation_of(args[7]);
  Array ay;
  ay.name = "out";
  ay.dtype = ax.dtype;
  ay.ndim = 4;
  const int64_t shape[] = {ax.shape[0], h.rows, frame.out_h, frame.out_w};
  double elements = 1;
  for (int64_t n : shape) elements *= static_cast<double>(n);
  if (elements > 1e15) return py::none();  // torch says what it thinks of that
  std::copy_n(shape, 4, ay.shape);
  for (int64_t i = 3, step = 1; i >= 0; step *= shape[i--]) ay.strides[i] = step;
  require_dtype(ax, kFloatTypes);
  if (!residual.is_none()) {
    if (!is_tensor(residual)) return py::none();
    const Array a = parse_array(residual, "residual");
    if (a.dtype != ax.dtype || a.ndim != 4 || !std::equal(shape, shape + 4, a.shape) || !a.contiguous())
      return py::none();
  }
  NewArray y = new_array(x, ax.dtype, shape, 4);
  ay.data = y.data;
  compute_conv2d(ax, ap, h.kind, bias, ay, stride, padding, dilation, activation, residual);
  return std::move(y.object);
}

PyObject* call_conv2d(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 9 && n != 10)
    return PyErr_Format(PyExc_TypeError, "conv2d: expected 9 or 10 arguments, got %zd", n);
  return called_directly(
      [&] { return n == 9 || args[9] == Py_None ? new_conv2d(args) : conv2d_into(args[9], args); });
}
PyMethodDef g_conv2d = {
    "conv2d", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_conv2d)), METH_FASTCALL,
    "conv2d(x: object, packed: object, bias: object, stride: object, padding: object, dilation: object, "
    "groups: object, activation: object, residual: object, out: object = None) -> object"};

}  // namespace

void register_conv(py::module_& m) {
  add_direct(m, g_conv2d);

  m.def(
      "conv2d_output_size",
      [](int64_t height, int64_t width, int64_t kh, int64_t kw, const Pair& stride, const Padding& padding,
         const Pair& dilation) {
        const Frame frame = output_frame(height, width, kh, kw, stride, padding, dilation);
        return py::make_tuple(frame.out_h, frame.out_w);
      },
      py::arg("height"), py::arg("width"), py::arg("kh"), py::arg("kw"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"));

  m.def(
      "conv2d_reference",
      [](py::handle x, py::handle weight, py::handle bias, py::handle out, const Pair& stride,
         const Padding& padding, const Pair& dilation, int64_t groups) {
        const Array ax = parse_array(x, "x"), aw = parse_array(weight, "weight"),
                    ay = parse_array(out, "out");
        for (const Array* a : {&ax, &aw, &ay}) {
          require_dtype(*a, {DType::f64});
          require_contiguous(*a);
        }
        require_shape(aw, {-1, -1, -1, -1});
        PARED_CHECK(groups >= 1 && aw.shape[0] % groups == 0, "groups: expected a positive divisor of ",
                    aw.shape[0], " output channels, got ", groups);
        require_shape(ax, {-1, aw.shape[1] * groups, -1, -1});
        const Frame frame =
            output_frame(ax.shape[2], ax.shape[3], aw.shape[2], aw.shape[3], stride, padding, dilation);
        require_shape(ay, {ax.shape[0], aw.shape[0], frame.out_h, frame.out_w});
        require_writable(ay);
        const double* b = nullptr;
        if (!bias.is_none()) {
          const Array ab = parse_array(bias, "bias");
          require_dtype(ab, {DType::f64});
          require_shape(ab, {aw.shape[0]});
          require_contiguous(ab);
          b = static_cast<const double*>(ab.data);
        }
        const ConvReference args{static_cast<const double*>(ax.data),
                                 static_cast<const double*>(aw.data),
                                 b,
                                 static_cast<double*>(ay.data),
                                 ax.shape[0],
                                 ax.shape[1],
                                 ax.shape[2],
                                 ax.shape[3],
                                 aw.shape[0],
                                 groups,
                                 aw.shape[2],
                                 aw.shape[3],
                                 stride[0],
                                 stride[1],
                                 padding[0],
                                 padding[2],
                                 dilation[0],
                                 dilation[1],
                                 frame.out_h,
                                 frame.out_w};
        py::gil_scoped_release unlocked;
        conv2d_reference(args);
      },
      py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("groups") = 1);
}

}  // namespace pared
