// What every operation on packed weights reads from its Python arguments.
#pragma once

#include <string>

#include "bindings/array.h"
#include "formats/csr.h"
#include "kernels/types.h"

namespace pared {

inline constexpr std::initializer_list<DType> kFloatTypes = {DType::f32, DType::f16, DType::bf16};

// A packed CSR weight; throws TypeError or ValueError when the array holds none.
CsrPacked packed_csr(const Array& a);

// "" and "none" are no activation; throws ValueError on an unknown name.
Activation parse_activation(const std::string& name);

// The bias of an operation whose output is `out`: float32 [rows], or null for None.
const float* parse_bias(py::handle bias, int64_t rows, const Array& out);

}  // namespace pared
