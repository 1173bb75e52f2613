// Arrays at the Python boundary: numpy arrays and torch tensors become one checked view. Nothing is copied
// or cast; what a kernel cannot take is refused with the argument's name, what was expected and what came.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "core/dtype.h"

namespace pared {

namespace py = pybind11;

struct Array {
  static constexpr int kMaxDims = 16;
  std::string name;  // of the argument, for messages
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];  // in elements
  bool writable = true;
  bool tensor = false;  // of torch

  int64_t size() const;
  int64_t bytes() const { return size() * dtype_size(dtype); }
  bool contiguous() const;  // C order; axes of size 1 may have any stride
  std::string shape_text() const;
  const char* copy_hint() const;  // how the user makes a contiguous one
};

bool is_tensor(py::handle object);  // of torch

// Reads a numpy array or a CPU torch tensor. Throws TypeError for anything else, for another device, an
// unknown dtype or a non-strided layout; ValueError for more than kMaxDims axes. The view borrows: the caller
// keeps `object` alive.
Array parse_array(py::handle object, const char* name);

void require_dtype(const Array& a, std::initializer_list<DType> allowed);
void require_shape(const Array& a, std::initializer_list<int64_t> expected);  // -1 takes any size
void require_contiguous(const Array& a);
void require_writable(const Array& a);
// Throws ValueError when the memory of the two overlaps.
void require_disjoint(const Array& a, const Array& b);

// A new array for what an operation returns, uninitialised and contiguous: a torch tensor where `like`, an
// array that was parsed, is one, else a numpy array.
struct NewArray {
  py::object object;
  void* data;
};
NewArray new_array(py::handle like, DType dtype, const int64_t* shape, int ndim);

// Throws std::runtime_error when autograd would need a gradient of one of these (arrays, or None) through an
// operation that has none.
void refuse_grad(std::initializer_list<std::pair<py::handle, const char*>> arrays);

// A [rows, cols] view of [..., cols]: leading axes folded into one stride, the last axis contiguous.
struct Rows {
  int64_t rows, cols, stride;
};
Rows fold_rows(const Array& a);

}  // namespace pared
