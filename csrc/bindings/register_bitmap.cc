// Bitmap weights, and pairs of a bitmap and a CSR weight: pack.
#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/bitmap.h"
#include "formats/pair.h"

namespace pared {
namespace {

DenseView matrix_view(const Array& a) {
  require_dtype(a, kFloatTypes);
  require_shape(a, {-1, -1});
  return {a.data, a.dtype, a.shape[0], a.shape[1], a.strides[0], a.strides[1]};
}

}  // namespace

void register_bitmap(py::module_& m) {
  m.def(
      "bitmap_pack_dense",
      [](py::handle weight) {
        const Array a = parse_array(weight, "weight");
        const DenseView w = matrix_view(a);
        BitmapPlan plan;
        {
          py::gil_scoped_release unlocked;
          plan = plan_bitmap(w);
        }
        return packed_array(plan.header, [&](uint8_t* out) { pack_bitmap(w, plan, out); });
      },
      py::arg("weight"));

  m.def(
      "pair_pack_dense",
      [](py::handle weight) {
        const Array a = parse_array(weight, "weight");
        const DenseView w = matrix_view(a);
        PairPlan plan;
        {
          py::gil_scoped_release unlocked;
          plan = plan_pair(w);
        }
        return packed_array(plan.header, [&](uint8_t* out) { pack_pair(w, plan, out); });
      },
      py::arg("weight"));

  m.def(
      "pair_few_tokens",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        return view_pair(packed_bytes(a), a.size()).few_tokens();
      },
      py::arg("packed"));
}

}  // namespace pared
