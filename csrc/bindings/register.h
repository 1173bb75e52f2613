#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace pared {

namespace py = pybind11;

// The Python exception that a C++ one becomes.
PyObject* python_error(const std::exception& e);

void register_info(py::module_& m);
void register_packed(py::module_& m);
void register_chain(py::module_& m);
void register_csr(py::module_& m);
void register_attention(py::module_& m);
void register_encoder(py::module_& m);
void register_bitmap(py::module_& m);
void register_int4(py::module_& m);
void register_int8(py::module_& m);
void register_bsr8(py::module_& m);
void register_conv(py::module_& m);
void register_pool(py::module_& m);
void register_reference(py::module_& m);
void register_probe(py::module_& m);
void register_topk(py::module_& m);

}  // namespace pared
