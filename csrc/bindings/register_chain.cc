// Several linear operations in one call: one after the other, or beside each other on the same input.
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "bindings/array.h"
#include "bindings/register.h"
#include "bindings/weights.h"
#include "core/check.h"
#include "formats/formats.h"
#include "ops/linear_chain.h"
#include "ops/packed_linear.h"

namespace pared {
namespace {

using Objects = std::vector<py::object>;

// The linear weight of any format that an array holds.
LinearWeight parse_weight(const Array& a) { return view_linear(packed_bytes(a), a.size()); }

// A list or tuple of n entries, any number for n < 0, which nobody changes meanwhile.
py::tuple entries_of(py::handle list, const char* name, py::ssize_t n = -1) {
  if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr()))
    throw TypeError(str(name, ": expected a list or a tuple, got ", Py_TYPE(list.ptr())->tp_name));
  auto entries = py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr()));
  if (!entries) throw py::error_already_set();
  const auto got = static_cast<py::ssize_t>(entries.size());
  PARED_CHECK(n < 0 || got == n, name, ": expected ", n, " entries, one for each weight, got ", got);
  return entries;
}

// What hands its outputs over as a panel, as rows of tokens, or not at all.
enum class Handover { panel, rows, none };
Handover handover(const PackedHeader& h) {
  switch (h.kind) {
    case PackedKind::csr:
    case PackedKind::bsr:
    case PackedKind::dense: return Handover::panel;
    case PackedKind::int8:
    case PackedKind::bitmap8:
    case PackedKind::bsr8:
    case PackedKind::int4: return Handover::rows;
    default: return Handover::none;
  }
}

// Linear operations one after the other, all of weights that hand over in the same way: a new array of x's
// kind. `biases` and `activations` are None, or have an entry, which may be None, for each weight.
py::object run_chain(py::handle x, py::handle weights, py::handle biases, py::handle activations) {
  const py::tuple packed = entries_of(weights, "weights");
  const auto n = static_cast<py::ssize_t>(packed.size());
  PARED_CHECK(n >= 2, "weights: expected two or more, got ", n);
  const py::tuple bias = biases.is_none() ? py::tuple() : entries_of(biases, "biases", n);
  const py::tuple activation =
      activations.is_none() ? py::tuple() : entries_of(activations, "activations", n);
  refuse_grad({{x, "x"}});
  for (py::handle b : bias) refuse_grad({{b, "biases"}});
  const Array ax = parse_array(x, "x");
  std::vector<ChainStage> panels;
  std::vector<RowStage> rows;
  int64_t inputs = 0, outputs = 0;
  Handover way = Handover::none;
  for (py::ssize_t i = 0; i < n; ++i) {
    const Array ap = parse_array(packed[i], "packed");
    const PackedHeader& h = checked_header(packed_bytes(ap), ap.size());
    if (h.kh != 0 || handover(h) == Handover::none)
      throw TypeError(
          str("weights: expected linear weights (csr, bsr, dense, or int8, bitmap8, bsr8, int4), got ",
              format_of(packed_bytes(ap), ap.size()).name, h.kh != 0 ? " of a convolution" : "", " at ", i));
    if (i == 0) {
      inputs = h.cols;
      way = handover(h);
    } else {
      if (handover(h) != way)
        throw TypeError(str("weights: expected float32 weights alone or int8 weights alone, got ",
                            format_of(packed_bytes(ap), ap.size()).name, " at ", i));
      PARED_CHECK(h.cols == outputs, "weights: expected weight ", i, " to take the ", outputs,
                  " outputs of the one before, got ", h.cols, " inputs");
    }
    outputs = h.rows;
    const float* b = bias.empty() ? nullptr : parse_bias(bias[i], h.rows);
    const Activation act = activation.empty() ? Activation::none : activation_of(activation[i]);
    if (way == Handover::panel) panels.push_back({packed_csr(ap), b, act});
    else rows.push_back({parse_weight(ap), b, act});
  }
  const Rows rx = parse_input(ax, inputs);
  int64_t shape[Array::kMaxDims];
  std::copy_n(ax.shape, ax.ndim - 1, shape);
  shape[ax.ndim - 1] = outputs;
  NewArray y = new_array(x, ax.dtype, shape, ax.ndim);
  const ChainArgs args{ax.data, rx.stride, rx.rows, ax.dtype, y.data, outputs};
  py::gil_scoped_release unlocked;
  if (way == Handover::panel) linear_chain_csr(args, panels);
  else linear_chain_rows(args, rows);
  return std::move(y.object);
}

PyObject* call_chain(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 4) return PyErr_Format(PyExc_TypeError, "linear_chain: expected 4 arguments, got %zd", n);
  return called_directly([&] { return run_chain(args[0], args[1], args[2], args[3]); });
}
PyMethodDef g_linear_chain = {
    "linear_chain", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_chain)), METH_FASTCALL,
    "linear_chain(x: object, weights: object, biases: object, activations: object) -> object"};

}  // namespace

void register_chain(py::module_& m) {
  add_direct(m, g_linear_chain);

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
