// Several linear operations in one call: one after the other, or beside each other on the same input.
#include <pybind11/stl.h>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/bitmap8.h"
#include "formats/bsr8.h"
#include "formats/formats.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "ops/bitmap8.h"
#include "ops/linear_chain.h"
#include "ops/linear_int4.h"
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

// Calls f(view) where several weights of `kind` can share an input; view(array) reads one. False elsewhere.
template <class F>
bool with_shared_view(PackedKind kind, const F& f) {
  switch (kind) {
    case PackedKind::csr:
    case PackedKind::bsr:
    case PackedKind::dense: f([](const Array& a) { return packed_csr(a); }); return true;
    case PackedKind::int8:
      f([](const Array& a) { return view_int8(packed_bytes(a), a.size()); });
      return true;
    case PackedKind::bitmap8:
      f([](const Array& a) { return view_bitmap8(packed_bytes(a), a.size()); });
      return true;
    case PackedKind::bsr8:
      f([](const Array& a) { return view_bsr8(packed_bytes(a), a.size()); });
      return true;
    default: return false;
  }
}

// Kinds that are read alike, by the first of them.
PackedKind shared_kind(const Array& a) {
  const PackedKind kind = checked_header(packed_bytes(a), a.size()).kind;
  return kind == PackedKind::bsr || kind == PackedKind::dense ? PackedKind::csr : kind;
}

template <class Packed>
const PackedHeader& header_of(const Packed& w) {
  return *w.header;
}
const PackedHeader& header_of(const Bsr8Packed& w) { return *w.panel.header; }

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
              if (kind == PackedKind::int4) {
                const Int4Packed w = view_int4(data, a.size());
                return *add(*w.header, [w](const LinearArgs& l) { linear_int4(l, w); });
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

  m.def(
      "shares_inputs",
      [](py::handle a, py::handle b) {
        const Array first = parse_array(a, "a"), second = parse_array(b, "b");
        const PackedKind kind = shared_kind(first);
        bool shares = false;
        if (kind == shared_kind(second))
          with_shared_view(kind, [&](const auto& view) {
            const auto v = view(first), w = view(second);
            shares = header_of(v).kh == 0 && header_of(w).kh == 0 && share_inputs(v, w);
          });
        return shares;
      },
      py::arg("a"), py::arg("b"));

  m.def(
      "linear_shared",
      [](py::handle x, const Objects& packed, const Objects& bias, const Objects& out,
         const std::vector<std::string>& activation) {
        const size_t n = packed.size();
        PARED_CHECK(n >= 1, "packed: expected a weight or more, got none");
        PARED_CHECK(bias.size() == n && out.size() == n && activation.size() == n, "packed: expected ",
                    bias.size(), " weights, as many as biases, outputs and activations, got ", n);
        const PackedKind kind = shared_kind(parse_array(packed[0], "packed"));
        const bool known = with_shared_view(kind, [&](const auto& view) {
          std::vector<SharedOutput<decltype(view(std::declval<const Array&>()))>> outputs;
          LinearArgs args{};
          std::vector<Array> written;
          for (size_t i = 0; i < n; ++i) {
            const Array ap = parse_array(packed[i], "packed");
            const auto w = view(ap);
            PARED_CHECK(header_of(w).kh == 0, "packed: expected linear weights, got a convolution's at ", i);
            if (i > 0)
              PARED_CHECK(share_inputs(outputs[0].w, w),
                          "packed: expected weights of equal inputs, tiles and activations, got another at ",
                          i);
            args = parse_linear(x, ap, header_of(w), bias[i], out[i], activation[i]);
            outputs.push_back({w, args.bias, args.activation, args.y, args.y_stride});
            written.push_back(parse_array(out[i], "out"));
            for (size_t j = 0; j < i; ++j) require_disjoint(written[i], written[j]);
          }
          py::gil_scoped_release unlocked;
          linear_shared({args.x, args.x_stride, args.tokens, args.dtype}, outputs);
        });
        PARED_CHECK(known, "packed: expected weights of a format that shares inputs, got kind ",
                    static_cast<int>(kind));
      },
      py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("out"), py::arg("activation"));
}

}  // namespace pared
