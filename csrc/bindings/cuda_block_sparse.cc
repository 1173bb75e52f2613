// The block-sparse products of the CUDA module. python/pared/_cuda_block_sparse.py has checked the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "bindings/cuda_register.h"
#include "bindings/names.h"
#include "core/check.h"
#include "cuda/block_sparse.h"

namespace py = pybind11;

namespace pared {
namespace {

// values, columns, dtype, block rows, block columns, outputs, cols, blocks
using BlockSparseTuple = std::tuple<uintptr_t, uintptr_t, std::string, int, int, int64_t, int64_t, int64_t>;

cuda::BlockSparseWeight weight(const BlockSparseTuple& t) {
  const auto& [values, columns, dtype, rows, cols, outputs, inputs, blocks] = t;
  const cuda::BlockSparseWeight w{reinterpret_cast<const void*>(values),
                                  reinterpret_cast<const int32_t*>(columns),
                                  dtype == "int8" ? DType::i8 : parse_float_dtype(dtype),
                                  rows,
                                  cols,
                                  outputs,
                                  inputs,
                                  blocks};
  if (w.dtype == DType::f32) throw TypeError("dtype: expected float16, bfloat16 or int8, got float32");
  PARED_CHECK(rows == 16 || rows == 32 || rows == 64 || rows == 128,
              "block: expected 16, 32, 64 or 128 rows, got ", rows);
  PARED_CHECK(cols > 0 && cols * dtype_size(w.dtype) % 16 == 0,
              "block: expected columns of a multiple of 16 bytes, got ", cols, " of ", dtype);
  PARED_CHECK(values % 16 == 0, "values: expected memory aligned to 16 bytes");
  PARED_CHECK(outputs >= 0 && inputs >= 0 && blocks >= 0, "w: expected non-negative sizes");
  return w;
}

}  // namespace

void register_cuda_block_sparse(py::module_& m) {
  m.def(
      "block_sparse_workspace",
      [](int64_t tokens, int64_t slots, int block_rows) {
        return cuda::block_sparse_workspace(tokens, slots, block_rows).bytes;
      },
      py::arg("tokens"), py::arg("slots"), py::arg("block_rows"));
  m.def(
      "force_block_sparse_kernel",
      [](int kernel) {
        PARED_CHECK(kernel == -1 || kernel == 0 || kernel == 128 || kernel == 256,
                    "kernel: expected -1, 0, 128 or 256, got ", kernel);
        cuda::force_block_sparse_kernel(kernel);
      },
      py::arg("kernel"));
  m.def("block_sparse_wgmma", &cuda::block_sparse_wgmma, py::arg("device"));
  m.def(
      "block_sparse_product",
      [](const BlockSparseTuple& w, uintptr_t items, int64_t item_count, int64_t slots, uintptr_t x,
         int64_t tokens, int64_t x_stride, uintptr_t x_scales, uintptr_t w_scales, uintptr_t bias,
         const std::string& activation, const std::string& dtype, uintptr_t y, int64_t y_stride,
         uintptr_t workspace, int device, uintptr_t stream) {
        const cuda::BlockSparseProduct p{weight(w),
                                         reinterpret_cast<const cuda::BlockItem*>(items),
                                         item_count,
                                         slots,
                                         reinterpret_cast<const void*>(x),
                                         tokens,
                                         x_stride,
                                         reinterpret_cast<const float*>(x_scales),
                                         reinterpret_cast<const float*>(w_scales),
                                         reinterpret_cast<const float*>(bias),
                                         parse_activation(activation),
                                         parse_float_dtype(dtype),
                                         reinterpret_cast<void*>(y),
                                         y_stride,
                                         reinterpret_cast<uint8_t*>(workspace)};
        PARED_CHECK(tokens >= 0 && item_count >= 0 && item_count < (int64_t{1} << 31) && slots >= 0,
                    "items: expected fewer than 2^31, got ", item_count);
        PARED_CHECK(x % 16 == 0 && x_stride * dtype_size(p.w.dtype) % 16 == 0,
                    "x: expected rows at multiples of 16 bytes");
        PARED_CHECK((p.w.dtype == DType::i8) == (x_scales && w_scales),
                    "x_scales, w_scales: expected for int8 weights, and for no others");
        py::gil_scoped_release unlocked;
        cuda::block_sparse_product(p, device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("w"), py::arg("items"), py::arg("item_count"), py::arg("slots"), py::arg("x"),
      py::arg("tokens"), py::arg("x_stride"), py::arg("x_scales"), py::arg("w_scales"), py::arg("bias"),
      py::arg("activation"), py::arg("dtype"), py::arg("y"), py::arg("y_stride"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace pared
