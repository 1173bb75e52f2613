// The parts of the CUDA module, one file each.
#pragma once

#include <pybind11/pybind11.h>

namespace pared {

void register_cuda_block_sparse(pybind11::module_& m);
void register_cuda_csr(pybind11::module_& m);
void register_cuda_decode(pybind11::module_& m);
void register_cuda_int8(pybind11::module_& m);

}  // namespace pared
