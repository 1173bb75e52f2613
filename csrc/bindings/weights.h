// What every operation on packed weights reads from its Python arguments.
#pragma once

#include <pybind11/numpy.h>

#include <string>

#include "bindings/array.h"
#include "bindings/names.h"
#include "core/weight_memory.h"
#include "formats/csr.h"
#include "formats/int8.h"
#include "kernels/types.h"
#include "ops/linear.h"

namespace pared {

inline constexpr std::initializer_list<DType> kFloatTypes = {DType::f32, DType::f16, DType::bf16};

// The bytes of a packed weight of any format: a contiguous uint8 vector. Throws TypeError or ValueError.
const uint8_t* packed_bytes(const Array& a);

// A packed CSR weight; throws TypeError or ValueError when the array holds none.
CsrPacked packed_csr(const Array& a);

// A [rows, cols] view of a linear weight, or of a convolution weight with the trailing axes flattened, which
// also gives `conv`. The dtype is the caller's to check.
DenseView dense_view(const Array& a, ConvShape& conv, int64_t groups);

// A numpy uint8 array of `bytes` bytes, aligned and placed as packed weights are, filled by write(uint8_t*)
// without the GIL.
template <class Write>
py::array_t<uint8_t> packed_array(size_t bytes, const Write& write) {
  void* p = allocate_weight(bytes);
  if (!p) throw std::bad_alloc();
  py::capsule owner(p, [](void* q) { free_weight(q); });
  {
    py::gil_scoped_release unlocked;
    write(static_cast<uint8_t*>(p));
  }
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(bytes), static_cast<uint8_t*>(p), owner);
}
// Of the size that `header` says.
template <class Write>
py::array_t<uint8_t> packed_array(const PackedHeader& header, const Write& write) {
  return packed_array(static_cast<size_t>(header.bytes), write);
}

// How an int8 operation's input becomes bytes: None (dynamic), or (scale, zero, low, high) with the last
// three as unsigned bytes. Throws ValueError on a scale of 0.
ActivationRange parse_activations(py::handle given);

// The activation of None or a name; throws TypeError or ValueError.
Activation activation_of(py::handle given);

// A bias: float32 [rows], or null for None; not of the memory of `out`, where that is given.
const float* parse_bias(py::handle bias, int64_t rows, const Array* out = nullptr);

// Input and output of a linear operation from `cols` to `rows` features, checked against each other.
struct RowsPair {
  Rows x, y;
};
RowsPair parse_rows(const Array& x, const Array& out, int64_t cols, int64_t rows);
Rows parse_input(const Array& x, int64_t cols);  // the first of them alone

// A linear operation with the weight `packed`, which has header `h`; its arguments, checked against each
// other, and the array that it writes: `out`, or for None a new one. The views borrow.
struct LinearCall {
  LinearArgs args;
  py::object out;
};
LinearCall parse_linear(py::handle x, const Array& packed, const PackedHeader& h, py::handle bias,
                        py::handle out, Activation activation);

}  // namespace pared
