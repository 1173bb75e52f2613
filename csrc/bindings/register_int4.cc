// 4-bit weights: pack and unpack.
#include <pybind11/numpy.h>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/int4.h"

namespace pared {
namespace {

Int4Packed packed_int4(const Array& a) { return view_int4(packed_bytes(a), a.size()); }

template <class View>
py::array_t<uint8_t> pack(const View& w, int group) {
  const PackedHeader header = plan_int4(w.rows, w.cols, w.dtype, group);
  return packed_array(header, [&](uint8_t* out) { pack_int4(w, group, header, out); });
}

}  // namespace

void register_int4(py::module_& m) {
  m.def(
      "int4_pack_dense",
      [](py::handle weight, int group) {
        const Array a = parse_array(weight, "weight");
        require_dtype(a, kFloatTypes);
        PARED_CHECK(a.ndim == 2, "weight: expected [out, in], got ", a.shape_text());
        return pack(DenseView{a.data, a.dtype, a.shape[0], a.shape[1], a.strides[0], a.strides[1]}, group);
      },
      py::arg("weight"), py::arg("group"));

  m.def(
      "int4_pack_quantized",
      [](py::handle q, py::handle scales, int group, const std::string& dtype) {
        const Array a = parse_array(q, "q"), s = parse_array(scales, "scales");
        require_dtype(a, {DType::i8});
        require_shape(a, {-1, -1});
        require_contiguous(a);
        require_dtype(s, {DType::f32});
        const DType type = parse_float_dtype(dtype);
        plan_int4(a.shape[0], a.shape[1], type, group);
        require_shape(s, {a.shape[0], (a.shape[1] + group - 1) / group});
        require_contiguous(s);
        return pack(Int4View{static_cast<const int8_t*>(a.data), static_cast<const float*>(s.data),
                             a.shape[0], a.shape[1], type},
                    group);
      },
      py::arg("q"), py::arg("scales"), py::arg("group"), py::arg("dtype") = "float32");

  m.def(
      "int4_group", [](py::handle packed) { return packed_int4(parse_array(packed, "packed")).group; },
      py::arg("packed"));

  m.def(
      "int4_unpack",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const Int4Packed w = packed_int4(a);
        py::array_t<int8_t> q({w.header->rows, w.header->cols});
        py::array_t<float> scales({w.header->rows, w.groups()});
        auto* to = q.mutable_data();
        auto* s = scales.mutable_data();
        {
          py::gil_scoped_release unlocked;
          unpack_int4(w, to, s);
        }
        return py::make_tuple(q, scales);
      },
      py::arg("packed"));
}

}  // namespace pared
