// Attention on plain arrays.
#include <algorithm>
#include <cmath>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "ops/attention.h"

namespace pared {
namespace {

Heads heads_of(const Array& a) {
  require_dtype(a, kFloatTypes);
  PARED_CHECK(a.ndim == 4, a.name, ": expected shape [batch, heads, positions, features], got ",
              a.shape_text());
  PARED_CHECK(a.size() == 0 || a.shape[3] == 1 || a.strides[3] == 1, a.name,
              ": expected a contiguous last axis, got stride ", a.strides[3]);
  return {a.data, a.strides[0], a.strides[1], a.strides[2]};
}

// Whether no two elements share memory: sorted by stride, each axis steps over all the smaller ones.
bool distinct(const Array& a) {
  std::pair<int64_t, int64_t> axes[4];
  for (int i = 0; i < 4; ++i) axes[i] = {a.strides[i], a.shape[i]};
  std::sort(axes, axes + 4);
  int64_t reach = 1;
  for (const auto& [stride, size] : axes) {
    if (size <= 1) continue;
    if (stride < reach) return false;
    reach = stride * size;
  }
  return true;
}

}  // namespace

void register_attention(py::module_& m) {
  m.def(
      "attention",
      [](py::handle q, py::handle k, py::handle v, py::handle mask, py::handle out, float scale,
         bool causal) {
        const Array aq = parse_array(q, "q"), ak = parse_array(k, "k"), av = parse_array(v, "v"),
                    ay = parse_array(out, "out");
        AttentionArgs args{};
        args.q = heads_of(aq), args.k = heads_of(ak), args.v = heads_of(av), args.y = heads_of(ay);
        for (const Array* a : {&ak, &av, &ay}) require_dtype(*a, {aq.dtype});
        require_writable(ay);
        const int64_t batch = aq.shape[0], heads = aq.shape[1], queries = aq.shape[2];
        require_shape(ak, {batch, -1, -1, aq.shape[3]});
        const int64_t groups = ak.shape[1], keys = ak.shape[2];
        PARED_CHECK(groups > 0 ? heads % groups == 0 : heads == 0,
                    "k: expected a number of heads that divides the ", heads, " of q, got ", groups);
        require_shape(av, {batch, groups, keys, -1});
        require_shape(ay, {batch, heads, queries, av.shape[3]});
        PARED_CHECK(ay.size() == 0 || distinct(ay), "out: expected memory that does not overlap itself");
        for (const Array* a : {&aq, &ak, &av}) require_disjoint(ay, *a);
        args.batch = batch, args.heads = heads, args.queries = queries, args.keys = keys;
        args.features = aq.shape[3], args.out_features = av.shape[3];
        args.shared = groups > 0 ? heads / groups : 1;
        PARED_CHECK(std::isfinite(scale), "scale: expected a finite number, got ", scale);
        args.scale = scale;
        args.dtype = aq.dtype;
        args.causal = causal;
        if (!mask.is_none()) {
          const Array am = parse_array(mask, "mask");
          require_dtype(am, {DType::f32, aq.dtype, DType::boolean});
          require_shape(am, {batch, heads, queries, keys});
          require_disjoint(ay, am);
          if (am.size() > 0) args.mask = am.data;
          args.mask_bytes = am.dtype == DType::boolean;
          if (!args.mask_bytes) args.mask_dtype = am.dtype;
          std::copy_n(am.strides, 4, args.mask_strides);
        }
        py::gil_scoped_release unlocked;
        attention(args);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("out"), py::arg("scale"),
      py::arg("causal"));
}

}  // namespace pared
