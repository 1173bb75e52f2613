// What can be done with a packed weight of any format.
#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/formats.h"

namespace pared {

void register_packed(py::module_& m) {
  m.def(
      "packed_info",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const uint8_t* data = packed_bytes(a);
        const PackedFormat& format = format_of(data, a.size());
        format.check(data, a.size());
        const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data);
        py::dict d;
        d["kind"] = format.name;
        d["rows"] = h.rows;
        d["cols"] = h.cols;
        d["nnz"] = h.nnz;
        d["dtype"] = dtype_name(h.dtype);
        d["channels"] = h.channels;
        d["kh"] = h.kh;
        d["kw"] = h.kw;
        d["groups"] = h.groups;
        d["tile"] = h.tile;
        d["block_k"] = h.block_k;
        d["entry_rows"] = h.entry_rows;
        d["entries"] = h.entries;
        return d;
      },
      py::arg("packed"));

  m.def(
      "packed_validate",
      [](py::handle packed) {
        const Array a = parse_array(packed, "packed");
        const uint8_t* data = packed_bytes(a);
        py::gil_scoped_release unlocked;
        format_of(data, a.size()).validate(data, a.size());
      },
      py::arg("packed"));

  m.def(
      "packed_unpack_dense",
      [](py::handle packed, py::handle out) {
        const Array a = parse_array(packed, "packed"), o = parse_array(out, "out");
        const uint8_t* data = packed_bytes(a);
        const PackedFormat& format = format_of(data, a.size());
        format.check(data, a.size());
        require_dtype(o, kFloatTypes);
        require_contiguous(o);
        require_writable(o);
        const PackedHeader& h = *reinterpret_cast<const PackedHeader*>(data);
        const int64_t size = h.rows * dense_cols(h);
        PARED_CHECK(o.size() == size, "out: expected ", size, " elements, got ", o.shape_text());
        py::gil_scoped_release unlocked;
        format.unpack_dense(data, a.size(), o.dtype, o.data);
      },
      py::arg("packed"), py::arg("out"));
}

}  // namespace pared
