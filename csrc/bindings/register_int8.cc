// Int8 weights: pack, unpack, and the plain integer product.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/bitmap8.h"
#include "formats/bsr8.h"
#include "formats/formats.h"
#include "formats/int8.h"
#include "ops/linear_int8.h"

namespace pared {
namespace {

Int8Packed packed_int8(const Array& a) { return view_int8(packed_bytes(a), a.size()); }
Bitmap8Packed packed_bitmap8(const Array& a) { return view_bitmap8(packed_bytes(a), a.size()); }
bool is_masked(const Array& a) {
  return checked_header(packed_bytes(a), a.size()).kind == PackedKind::bitmap8;
}

// masked: as formats/bitmap8.h stores it, linear weights alone.
py::array_t<uint8_t> pack(const Int8Source& w, const PackedHeader& header, const ActivationRange& activations,
                          bool masked) {
  if (!masked) return packed_array(header, [&](uint8_t* out) { pack_int8(w, activations, header, out); });
  PARED_CHECK(header.kh == 0, "weight: expected [out, in], got a convolution's");
  Bitmap8Plan plan;
  {
    py::gil_scoped_release unlocked;
    plan = plan_bitmap8(w, header, activations);
  }
  return packed_array(plan.header, [&](uint8_t* out) { pack_bitmap8(w, plan, out); });
}

// [rows, cols] with unit stride along cols; any row stride.
Rows matrix(const Array& a, DType dtype) {
  require_dtype(a, {dtype});
  require_shape(a, {-1, -1});
  return fold_rows(a);
}

}  // namespace

void register_int8(py::module_& m) {
  m.def(
      "int8_pack_dense",
      [](py::handle weight, py::handle activations, bool masked, int64_t groups) {
        const Array a = parse_array(weight, "weight");
        require_dtype(a, kFloatTypes);
        ConvShape conv;
        const Int8Source source{dense_view(a, conv, groups)};
        const ActivationRange range = parse_activations(activations);
        return pack(source, plan_int8(source, conv, a.dtype, range), range, masked);
      },
      py::arg("weight"), py::arg("activations") = py::none(), py::arg("masked") = false,
      py::arg("groups") = 1);

  m.def(
      "int8_pack_quantized",
      [](py::handle q, py::handle scales, const std::string& dtype, py::handle activations, bool masked,
         int64_t groups) {
        const Array a = parse_array(q, "q"), s = parse_array(scales, "scales");
        require_dtype(a, {DType::i8});
        ConvShape conv;
        const DenseView view = dense_view(a, conv, groups);
        require_dtype(s, {DType::f32});
        require_shape(s, {a.shape[0]});
        require_contiguous(s);
        const ActivationRange range = parse_activations(activations);
        const DType t = parse_float_dtype(dtype);
        const Int8Source source{view, static_cast<const float*>(s.data)};
        return pack(source, plan_int8(source, conv, t, range), range, masked);
      },
      py::arg("q"), py::arg("scales"), py::arg("dtype") = "float32", py::arg("activations") = py::none(),
      py::arg("masked") = false, py::arg("groups") = 1);

  m.def(
      "int8_activations",
      [](py::handle packed) -> py::object {
        const Array a = parse_array(packed, "packed");
        const PackedKind kind = checked_header(packed_bytes(a), a.size()).kind;
        const ActivationRange& r = kind == PackedKind::bsr8
                                       ? *view_bsr8(packed_bytes(a), a.size()).activations
                                   : is_masked(a) ? *packed_bitmap8(a).activations
                                                  : *packed_int8(a).activations;
        if (r.scale == 0.0f) return py::none();
        return py::make_tuple(r.scale, r.zero, r.low, r.high);
      },
      py::arg("packed"));

  m.def(
      "int8_unpack",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const bool masked = is_masked(a);
        const PackedHeader& h = masked ? *packed_bitmap8(a).header : *packed_int8(a).header;
        py::array_t<int8_t> q({h.rows, dense_cols(h)});
        py::array_t<float> scales(h.rows);
        auto* to = q.mutable_data();
        auto* s = scales.mutable_data();
        {
          py::gil_scoped_release unlocked;
          if (masked) unpack_bitmap8(packed_bitmap8(a), to, s);
          else unpack_int8(packed_int8(a), to, s);
        }
        return py::make_tuple(q, scales);
      },
      py::arg("packed"));

  m.def(
      "gemm_s8",
      [](py::handle a, py::handle b, py::handle out) {
        const Array aa = parse_array(a, "a"), ab = parse_array(b, "b"), ac = parse_array(out, "out");
        const Rows ra = matrix(aa, DType::i8), rb = matrix(ab, DType::i8), rc = matrix(ac, DType::i32);
        PARED_CHECK(ra.cols == rb.cols, "b: expected shape [any, ", ra.cols,
                    "] as the last dimension of a, got ", ab.shape_text());
        PARED_CHECK(ra.cols <= kGemmMaxCols, "a: expected a last dimension of at most ", kGemmMaxCols,
                    ", beyond which int32 sums could overflow, got ", aa.shape_text());
        require_shape(ac, {ra.rows, rb.rows});
        require_contiguous(ac);
        require_writable(ac);
        require_disjoint(ac, aa);
        require_disjoint(ac, ab);
        const GemmS8Args args{static_cast<const int8_t*>(aa.data),
                              ra.stride,
                              ra.rows,
                              static_cast<const int8_t*>(ab.data),
                              rb.stride,
                              rb.rows,
                              ra.cols,
                              static_cast<int32_t*>(ac.data),
                              rc.stride};
        py::gil_scoped_release unlocked;
        gemm_s8(args);
      },
      py::arg("a"), py::arg("b"), py::arg("out"));
}

}  // namespace pared
