// CSR weights: pack, unpack, validate.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/csr.h"

namespace pared {
namespace {

PackedKind parse_kind(const std::string& kind) {
  if (kind == "csr") return PackedKind::csr;
  if (kind == "bsr") return PackedKind::bsr;
  if (kind == "dense") return PackedKind::dense;
  throw ValueError(str("kind: expected csr, bsr or dense, got '", kind, "'"));
}

template <class View>
py::array_t<uint8_t> pack(const View& w, const ConvShape& conv, const std::string& kind_name,
                          int entry_rows) {
  const PackedKind kind = parse_kind(kind_name);
  PARED_CHECK(entry_rows == 1 || entry_rows == kQuadRows, "entry_rows: expected 1 or ", kQuadRows, ", got ",
              entry_rows);
  PanelPlan plan;
  {
    // Everything is validated and owned by the caller from here on; other Python threads may run.
    py::gil_scoped_release unlocked;
    plan = plan_csr(w, conv, kind, entry_rows);
  }
  return packed_array(plan.header, [&](uint8_t* out) { pack_csr(w, plan, out); });
}

}  // namespace

void register_csr(py::module_& m) {
  m.def(
      "csr_pack_dense",
      [](py::handle weight, int64_t groups, const std::string& kind, int entry_rows) {
        const Array a = parse_array(weight, "weight");
        require_dtype(a, kFloatTypes);
        ConvShape conv;
        const DenseView view = dense_view(a, conv, groups);
        return pack(view, conv, kind, entry_rows);
      },
      py::arg("weight"), py::arg("groups") = 1, py::arg("kind") = "csr", py::arg("entry_rows") = 1);

  m.def(
      "csr_pack_csr",
      [](py::handle row_ptr, py::handle columns, py::handle values, int64_t rows, int64_t cols,
         const std::string& kind, int entry_rows) {
        const Array p = parse_array(row_ptr, "crow_indices"), c = parse_array(columns, "col_indices"),
                    v = parse_array(values, "values");
        require_dtype(p, {DType::i32, DType::i64});
        require_dtype(c, {p.dtype});
        require_dtype(v, kFloatTypes);
        PARED_CHECK(rows >= 0 && cols >= 0, "shape: expected non-negative sizes, got [", rows, ", ", cols,
                    "]");
        require_shape(p, {rows + 1});
        require_shape(c, {-1});
        require_shape(v, {c.shape[0]});
        for (const Array* a : {&p, &c, &v}) require_contiguous(*a);
        const int64_t last = p.dtype == DType::i32 ? static_cast<const int32_t*>(p.data)[rows]
                                                   : static_cast<const int64_t*>(p.data)[rows];
        PARED_CHECK(last == c.shape[0], "crow_indices: expected the last entry to be ", c.shape[0],
                    " (the number of values), got ", last);
        return pack(CsrView{rows, cols, p.data, c.data, p.dtype, v.data, v.dtype}, ConvShape{}, kind,
                    entry_rows);
      },
      py::arg("crow_indices"), py::arg("col_indices"), py::arg("values"), py::arg("rows"), py::arg("cols"),
      py::arg("kind") = "csr", py::arg("entry_rows") = 1);

  m.def(
      "csr_unpack",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const CsrPacked w = packed_csr(a);
        check_sum(*w.header);  // before its counts become memory
        py::array_t<int64_t> row_ptr(w.header->rows + 1), columns(w.header->nnz);
        py::array_t<float> values(w.header->nnz);
        auto *p = row_ptr.mutable_data(), *c = columns.mutable_data();
        auto* v = values.mutable_data();
        {
          py::gil_scoped_release unlocked;
          unpack_csr(w, p, c, v);
        }
        return py::make_tuple(row_ptr, columns, values);
      },
      py::arg("packed"));
}

}  // namespace pared
