// Several linear operations in one call: one after the other, or beside each other on the same input.
#include <pybind11/stl.h>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "ops/linear_chain.h"
#include "ops/packed_linear.h"

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
    done(parse_bias(bias[i], h.rows, &ay), parse_activation(activation[i]));
  }
  const RowsPair r = parse_rows(ax, ay, cols, rows);
  return {ax.data, r.x.stride, r.x.rows, ax.dtype, ay.data, r.y.stride};
}

// The linear weight of any format that an array holds.
LinearWeight parse_weight(const Array& a) { return view_linear(packed_bytes(a), a.size()); }

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
      "linear_chain_rows",
      [](py::handle x, const Objects& packed, const Objects& bias, py::handle out,
         const std::vector<std::string>& activation) {
        std::vector<RowStage> stages;
        const ChainArgs args = parse_chain(
            x, packed, bias, out, activation,
            [&](const Array& a) -> const PackedHeader& {
              stages.push_back({parse_weight(a), nullptr, Activation{}});
              return header_of(stages.back().w);
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
        return share_inputs(parse_weight(parse_array(a, "a")), parse_weight(parse_array(b, "b")));
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
        std::vector<SharedOutput<LinearWeight>> outputs;
        LinearArgs args{};
        std::vector<Array> written;
        for (size_t i = 0; i < n; ++i) {
          const Array ap = parse_array(packed[i], "packed");
          const LinearWeight w = parse_weight(ap);
          if (i == 0)
            PARED_CHECK(share_inputs(w, w),
                        "packed: expected weights of a format that shares inputs, got kind ",
                        static_cast<int>(header_of(w).kind));
          else
            PARED_CHECK(share_inputs(outputs[0].w, w),
                        "packed: expected weights of equal inputs, tiles and activations, got another at ",
                        i);
          args = parse_linear(x, ap, header_of(w), bias[i], out[i], parse_activation(activation[i])).args;
          outputs.push_back({w, args.bias, args.activation, args.y, args.y_stride});
          written.push_back(parse_array(out[i], "out"));
          for (size_t j = 0; j < i; ++j) require_disjoint(written[i], written[j]);
        }
        py::gil_scoped_release unlocked;
        linear_shared({args.x, args.x_stride, args.tokens, args.dtype}, outputs);
      },
      py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("out"), py::arg("activation"));
}

}  // namespace pared
