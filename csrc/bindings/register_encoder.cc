// What transformer encoders are made of beside linear layers and attention.
#include <cmath>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "ops/layer_norm.h"

namespace pared {
namespace {

// A float32 vector [cols] that is read beside `out`, or null for None.
const float* parse_vector(py::handle object, const char* name, int64_t cols, const Array& out) {
  if (object.is_none()) return nullptr;
  const Array a = parse_array(object, name);
  require_dtype(a, {DType::f32});
  require_shape(a, {cols});
  require_contiguous(a);
  require_disjoint(out, a);
  return static_cast<const float*>(a.data);
}

float parse_eps(double eps) {
  PARED_CHECK(std::isfinite(eps) && eps >= 0, "eps: expected a finite number of at least 0, got ", eps);
  return static_cast<float>(eps);
}

}  // namespace

void register_encoder(py::module_& m) {
  m.def(
      "layer_norm",
      [](py::handle x, py::handle residual, py::handle weight, py::handle bias, py::handle out, double eps) {
        const Array ax = parse_array(x, "x"), ay = parse_array(out, "out");
        PARED_CHECK(ax.ndim >= 1, "x: expected one axis or more, got ", ax.shape_text());
        const int64_t cols = ax.shape[ax.ndim - 1];
        const RowsPair r = parse_rows(ax, ay, cols, cols);
        LayerNormArgs args{};
        args.x = ax.data, args.x_stride = r.x.stride, args.y = ay.data, args.y_stride = r.y.stride;
        args.dtype = ax.dtype, args.rows = r.x.rows, args.cols = cols;
        if (!residual.is_none()) {
          const Array ar = parse_array(residual, "residual");
          require_dtype(ar, {ax.dtype});
          bool same = ar.ndim == ax.ndim;
          for (int i = 0; same && i < ax.ndim; ++i) same = ar.shape[i] == ax.shape[i];
          PARED_CHECK(same, "residual: expected the shape of x, ", ax.shape_text(), ", got ",
                      ar.shape_text());
          require_disjoint(ay, ar);
          args.residual = ar.data;
          args.residual_stride = fold_rows(ar).stride;
        }
        args.weight = parse_vector(weight, "weight", cols, ay);
        args.bias = parse_vector(bias, "bias", cols, ay);
        args.eps = parse_eps(eps);
        py::gil_scoped_release unlocked;
        normalise(args);
      },
      py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("eps"));
}

}  // namespace pared
