// int8 weights with zeros in blocks: pack, and the quantised values.
#include <pybind11/numpy.h>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/bsr8.h"
#include "formats/formats.h"

namespace pared {
namespace {

Bsr8Packed packed_bsr8(const Array& a) { return view_bsr8(packed_bytes(a), a.size()); }

}  // namespace

void register_bsr8(py::module_& m) {
  m.def(
      "bsr8_pack",
      [](py::handle weight, py::handle scales, int64_t groups, int entry_rows, const std::string& dtype,
         py::handle activations) {
        const Array a = parse_array(weight, scales.is_none() ? "weight" : "q");
        const float* given = nullptr;
        if (scales.is_none()) {
          require_dtype(a, kFloatTypes);
        } else {
          require_dtype(a, {DType::i8});
        }
        ConvShape conv;
        const DenseView view = dense_view(a, conv, groups);
        if (!scales.is_none()) {
          const Array s = parse_array(scales, "scales");
          require_dtype(s, {DType::f32});
          require_shape(s, {view.rows});
          require_contiguous(s);
          given = static_cast<const float*>(s.data);
        }
        PARED_CHECK(entry_rows == 0 || entry_rows == 1 || entry_rows == kQuadRows,
                    "entry_rows: expected 0 (the faster), 1 or ", kQuadRows, ", got ", entry_rows);
        const DType type = parse_float_dtype(dtype);
        const ActivationRange range = parse_activations(activations);
        Bsr8Plan plan;
        {
          py::gil_scoped_release unlocked;
          plan = plan_bsr8(view, conv, given, entry_rows, type, range);
        }
        return packed_array(plan.panel.header, [&](uint8_t* out) { pack_bsr8(view, plan, out); });
      },
      py::arg("weight"), py::arg("scales") = py::none(), py::arg("groups") = 1, py::arg("entry_rows") = 0,
      py::arg("dtype") = "float32", py::arg("activations") = py::none());

  m.def(
      "bsr8_unpack",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const Bsr8Packed w = packed_bsr8(a);
        const PackedHeader& h = *w.panel.header;
        check_sum(h);  // before its sizes become memory
        py::array_t<int8_t> values({h.rows, dense_cols(h)});
        py::array_t<float> scales(h.rows);
        int8_t* v = values.mutable_data();
        std::copy_n(w.scales, h.rows, scales.mutable_data());
        {
          py::gil_scoped_release unlocked;
          unpack_bsr8_values(w, v);
        }
        return py::make_tuple(values, scales);
      },
      py::arg("packed"));
}

}  // namespace pared
