// What transformer encoders are made of beside linear layers and attention.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "ops/encoder.h"
#include "ops/layer_norm.h"

namespace pared {
namespace {

// A vector [cols].
Array parse_vector(py::handle object, const char* name, int64_t cols, std::initializer_list<DType> dtypes) {
  const Array a = parse_array(object, name);
  require_dtype(a, dtypes);
  require_shape(a, {cols});
  require_contiguous(a);
  return a;
}

// A float32 vector [cols] beside `out`, or null for None.
const float* parse_float_vector(py::handle object, const char* name, int64_t cols, const Array& out) {
  if (object.is_none()) return nullptr;
  const Array a = parse_vector(object, name, cols, {DType::f32});
  require_disjoint(out, a);
  return static_cast<const float*>(a.data);
}

float parse_eps(double eps) {
  PARED_CHECK(std::isfinite(eps) && eps >= 0, "eps: expected a finite number of at least 0, got ", eps);
  return static_cast<float>(eps);
}

// What an encoder layer was built from, by the name of the argument and its place there.
using Objects = std::vector<py::object>;

// An encoder layer whose weights are parsed once. It keeps the tensors, and looks on each call whether they
// still have the memory that was parsed: torch gives a parameter other memory, and another dtype, in place.
class Encoder {
 public:
  Encoder(const Objects& packed, const Objects& bias, const std::vector<std::string>& activation,
          const Objects& norm, const std::vector<double>& eps, int64_t heads, float scale, bool norm_first) {
    PARED_CHECK(packed.size() == 6 && bias.size() == 6 && activation.size() == 6,
                "packed: expected six weights (q, k, v, out, up, down), biases and activations, got ",
                packed.size(), ", ", bias.size(), " and ", activation.size());
    PARED_CHECK(norm.size() == 4 && eps.size() == 2,
                "norm: expected a weight and a bias for each of two normalisations, got ", norm.size());
    EncoderLinear* const linears[] = {&layer_.q, &layer_.k, &layer_.v, &layer_.out, &layer_.up, &layer_.down};
    for (int i = 0; i < 6; ++i) {
      const Array a = parse_array(packed[i], "packed");
      const uint8_t* data = packed_bytes(a);
      linears[i]->w = view_linear(data, a.size());
      kept_.emplace_back(packed[i], a);
      linears[i]->bias = static_cast<const float*>(
          vector(bias[i], "bias", header_of(linears[i]->w).rows, {DType::f32}).data);
      linears[i]->activation = parse_activation(activation[i]);
    }
    const auto rows = [&](int i) { return static_cast<int64_t>(header_of(linears[i]->w).rows); };
    const auto cols = [&](int i) { return static_cast<int64_t>(header_of(linears[i]->w).cols); };
    layer_.features = cols(0);
    const int64_t expected[6][2] = {{rows(0), cols(0)}, {rows(0), cols(0)}, {rows(0), cols(0)},
                                    {cols(0), rows(0)}, {rows(4), cols(0)}, {cols(0), rows(4)}};
    for (int i = 0; i < 6; ++i)
      PARED_CHECK(rows(i) == expected[i][0] && cols(i) == expected[i][1], "packed: expected weight ", i,
                  " to be [", expected[i][0], ", ", expected[i][1], "], got [", rows(i), ", ", cols(i), "]");
    PARED_CHECK(heads >= 1 && rows(0) % heads == 0, "heads: expected a positive divisor of ", rows(0),
                ", got ", heads);
    PARED_CHECK(std::isfinite(scale), "scale: expected a finite number, got ", scale);
    layer_.heads = heads, layer_.scale = scale, layer_.norm_first = norm_first;
    EncoderNorm* const norms[] = {&layer_.first, &layer_.second};
    for (int i = 0; i < 2; ++i)
      *norms[i] = {vector(norm[2 * i], "norm", layer_.features, kFloatTypes),
                   vector(norm[2 * i + 1], "norm", layer_.features, kFloatTypes), parse_eps(eps[i])};
  }

  // False where the layer has to be built anew; nothing is computed then.
  bool run(py::handle x, py::handle mask, py::handle out, bool batch_first, bool causal) const {
    for (const auto& [object, was] : kept_) {
      const Array now = parse_array(object, "packed");
      if (now.data != was.data || now.dtype != was.dtype || now.size() != was.size()) return false;
    }
    const Array ax = parse_array(x, "x"), ay = parse_array(out, "out");
    require_dtype(ax, kFloatTypes);
    require_dtype(ay, {ax.dtype});
    require_shape(ax, {-1, -1, layer_.features});
    require_shape(ay, {ax.shape[0], ax.shape[1], layer_.features});
    require_contiguous(ax);
    require_contiguous(ay);
    require_writable(ay);
    require_disjoint(ay, ax);
    EncoderArgs a{};
    a.x = ax.data, a.y = ay.data, a.dtype = ax.dtype;
    a.batch_first = batch_first, a.causal = causal;
    a.batch = ax.shape[batch_first ? 0 : 1], a.tokens = ax.shape[batch_first ? 1 : 0];
    if (!mask.is_none()) {
      const Array am = parse_array(mask, "mask");
      require_dtype(am, {DType::f32, DType::f16, DType::bf16, DType::boolean});
      require_shape(am, {a.batch, layer_.heads, a.tokens, a.tokens});
      require_disjoint(ay, am);
      if (am.size() > 0) a.mask = am.data;
      a.mask_bytes = am.dtype == DType::boolean;
      if (!a.mask_bytes) a.mask_dtype = am.dtype;
      std::copy_n(am.strides, 4, a.mask_strides);
    }
    py::gil_scoped_release unlocked;
    encoder_layer(layer_, a);
    return true;
  }

 private:
  EncoderVector vector(const py::object& object, const char* name, int64_t size,
                       std::initializer_list<DType> dtypes) {
    if (object.is_none()) return {nullptr, DType::f32};
    const Array a = parse_vector(object, name, size, dtypes);
    kept_.emplace_back(object, a);
    return {a.data, a.dtype};
  }

  EncoderLayer layer_;
  std::vector<std::pair<py::object, Array>> kept_;
};

}  // namespace

void register_encoder(py::module_& m) {
  py::class_<Encoder>(m, "EncoderLayer")
      .def(py::init<const Objects&, const Objects&, const std::vector<std::string>&, const Objects&,
                    const std::vector<double>&, int64_t, float, bool>(),
           py::arg("packed"), py::arg("bias"), py::arg("activation"), py::arg("norm"), py::arg("eps"),
           py::arg("heads"), py::arg("scale"), py::arg("norm_first"))
      .def("__call__", &Encoder::run, py::arg("x"), py::arg("mask"), py::arg("out"),
           py::arg("batch_first") = true, py::arg("causal") = false);

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
        args.weight = parse_float_vector(weight, "weight", cols, ay);
        args.bias = parse_float_vector(bias, "bias", cols, ay);
        args.eps = parse_eps(eps);
        py::gil_scoped_release unlocked;
        normalise(args);
      },
      py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("eps"));
}

}  // namespace pared
