// Linear operations one after the other in one call.
#include <pybind11/stl.h>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/bitmap8.h"
#include "formats/bsr8.h"
#include "formats/formats.h"
#include "formats/int8.h"
#include "ops/bitmap8.h"
#include "ops/linear_chain.h"
#include "ops/linear_int8.h"

namespace pared {
namespace {

using Objects = std::vector<py::object>;

// Checks the arguments of a chain against each other: stage(packed) gives a weight's header, and keeps the
// weight; done(bias, activation) is called behind it.
template <class Stage, class Done>
ChainArgs parse_chain(py::handle x, const Objects& packed, const Objects& bias, py::handle out,
                      const std::vector<std::string>& activation, const Stage& stage, const Done& done) {
  PARED_CHECK(packed.size() >= 2, "packed: expected two weights or more, got ", packed.size());
  PARED_CHECK(bias.size() == packed.size(), "bias: expected ", packed.size(), " entries, got ", bias.size());
  PARED_CHECK(activation.size() == packed.size(), "activation: expected ", packed.size(), " entries, got ",
              activation.size());
  const Array ax = parse_array(x, "x"), ay = parse_array(out, "out");
  int64_t cols = 0, rows = 0;
  for (size_t i = 0; i < packed.size(); ++i) {
    const Array ap = parse_array(packed[i], "packed");
    const PackedHeader& h = stage(ap);
    PARED_CHECK(h.kh == 0, "packed: expected linear weights, got a convolution's at ", i);
    if (i > 0)
      PARED_CHECK(h.cols == rows, "packed: expected weight ", i, " to take the ", rows,
                  " outputs of the one before, got ", h.cols, " inputs");
    else cols = h.cols;
    rows = h.rows;
    require_disjoint(ay, ap);
    done(parse_bias(bias[i], h.rows, ay), parse_activation(activation[i]));
  }
  const RowsPair r = parse_rows(ax, ay, cols, rows);
  return {ax.data, r.x.stride, r.x.rows, ax.dtype, ay.data, r.y.stride};
}

}  // namespace

void register_chain(py::module_& m) {
  m.def(
      "linear_chain_csr",
      [](py::handle x, const Objects& packed, const Objects& bias, py::handle out,
         const std::vector<std::string>& activation) {
        std::vector<ChainStage> stages;
        const ChainArgs args = parse_chain(
            x, packed, bias, out, activation,
            [&](const Array& a) -> const PackedHeader& {
              stages.push_back({packed_csr(a), nullptr, Activation{}});
              return *stages.back().w.header;
            },
            [&](const float* b, Activation act) {
              stages.back().bias = b;
              stages.back().activation = act;
            });
        py::gil_scoped_release unlocked;
        linear_chain_csr(args, stages);
      },
      py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("out"), py::arg("activation"));

  m.def(
      "linear_chain_int8",
      [](py::handle x, const Objects& packed, const Objects& bias, py::handle out,
         const std::vector<std::string>& activation) {
        std::vector<RowStage> stages;
        const auto add = [&](const PackedHeader& h, std::function<void(const LinearArgs&)> run) {
          stages.push_back({std::move(run), h.rows, nullptr, Activation{}});
          return &h;
        };
        const ChainArgs args = parse_chain(
            x, packed, bias, out, activation,
            [&](const Array& a) -> const PackedHeader& {
              const uint8_t* data = packed_bytes(a);
              const PackedKind kind = checked_header(data, a.size()).kind;
              if (kind == PackedKind::bsr8) {
                const Bsr8Packed w = view_bsr8(data, a.size());
                return *add(*w.panel.header, [w](const LinearArgs& l) { linear_bsr8(l, w); });
              }
              if (kind == PackedKind::bitmap8) {
                const Bitmap8Packed w = view_bitmap8(data, a.size());
                return *add(*w.header, [w](const LinearArgs& l) { linear_bitmap8(l, w); });
              }
              const Int8Packed w = view_int8(data, a.size());
              return *add(*w.header, [w](const LinearArgs& l) { linear_int8(l, w); });
            },
            [&](const float* b, Activation act) {
              stages.back().bias = b;
              stages.back().activation = act;
            });
        py::gil_scoped_release unlocked;
        linear_chain_rows(args, stages);
      },
      py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("out"), py::arg("activation"));
}

}  // namespace pared
