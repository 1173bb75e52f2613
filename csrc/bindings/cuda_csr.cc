// The unstructured sparse products of the CUDA module. python/pared/_cuda_sparse.py has checked the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "bindings/cuda_register.h"
#include "bindings/names.h"
#include "core/check.h"
#include "cuda/csr.h"
#include "cuda/device.h"

namespace py = pybind11;

namespace pared {
namespace {

// values, columns, starts, dtype, near, block columns, outputs, cols, items, item count, order
using CsrTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, std::string, bool, int, int64_t, int64_t,
                            uintptr_t, int64_t, uintptr_t>;

cuda::CsrWeight weight(const CsrTuple& t) {
  const auto& [values, columns, starts, dtype, near, block_cols, outputs, cols, items, item_count, order] = t;
  PARED_CHECK(values % 16 == 0 && columns % 8 == 0, "w: expected memory aligned to 16 and 8 bytes");
  PARED_CHECK(
      block_cols >= 1 && cuda::csr_slots(block_cols) <= cuda::kCsrMostSlots && outputs >= 0 && cols >= 0,
      "w: expected positive sizes");
  PARED_CHECK(outputs < (int64_t{1} << 31), "w: expected fewer than 2^31 outputs, got ", outputs);
  return {reinterpret_cast<const void*>(values),
          reinterpret_cast<const void*>(columns),
          reinterpret_cast<const uint32_t*>(starts),
          parse_float_dtype(dtype),
          near,
          block_cols,
          cuda::csr_slots(block_cols),
          static_cast<int32_t>(cuda::csr_blocks(cols, block_cols)),
          cuda::csr_index_blocks(block_cols),
          outputs,
          cols,
          reinterpret_cast<const cuda::CsrItem*>(items),
          item_count,
          reinterpret_cast<const int32_t*>(order)};
}

}  // namespace

void register_cuda_csr(py::module_& m) {
  m.attr("CSR_FOUR") = cuda::kCsrFour;
  m.attr("CSR_GROUP") = cuda::kCsrGroup;
  m.attr("CSR_WARPS") = cuda::kCsrWarps;
  m.attr("CSR_GATHER_SUMS") = cuda::kCsrGatherSums;
  m.attr("CSR_INDEX_SLOTS") = cuda::kCsrIndexSlots;
  m.attr("CSR_REACH") = cuda::kCsrReach;
  m.attr("CSR_LAST_REACH") = cuda::kCsrLastReach;
  m.def("csr_block_cols", &cuda::csr_block_cols, py::arg("cols"), py::arg("shared_limit"));
  m.def(
      "plan_csr",
      [](int64_t tokens, int64_t outputs, int64_t cols, int block_cols, int item_bytes, int64_t items,
         int multiprocessors, int64_t shared_limit, int64_t few) {
        const cuda::CsrPlan p = cuda::plan_csr_product(tokens, outputs, cols, block_cols, item_bytes, items,
                                                       multiprocessors, shared_limit, few);
        py::dict d;
        d["panel"] = p.panel;
        d["tokens"] = p.tokens;
        d["rows"] = p.rows;
        d["token_tiles"] = p.token_tiles;
        d["row_tiles"] = p.row_tiles;
        d["chunk_blocks"] = p.chunk_blocks;
        d["grid"] = p.grid;
        d["shared_bytes"] = p.shared_bytes;
        d["workspace_bytes"] = p.workspace_bytes;
        return d;
      },
      py::arg("tokens"), py::arg("outputs"), py::arg("cols"), py::arg("block_cols"), py::arg("item_bytes"),
      py::arg("items"), py::arg("multiprocessors"), py::arg("shared_limit"), py::arg("few") = -1,
      "What the host decides; no device is touched.");
  m.def(
      "csr_product",
      [](const CsrTuple& t, uintptr_t x, int64_t tokens, int64_t x_stride, uintptr_t bias,
         const std::string& activation, uintptr_t y, int64_t y_stride, uintptr_t workspace,
         int64_t workspace_bytes, int64_t few, int device, uintptr_t stream) {
        const cuda::CsrProduct p{weight(t),
                                 reinterpret_cast<const void*>(x),
                                 tokens,
                                 x_stride,
                                 reinterpret_cast<const float*>(bias),
                                 parse_activation(activation),
                                 reinterpret_cast<void*>(y),
                                 y_stride,
                                 reinterpret_cast<uint8_t*>(workspace)};
        PARED_CHECK(tokens >= 0, "x: expected non-negative sizes");
        const cuda::CsrPlan plan = cuda::plan_csr_product(
            tokens, p.w.outputs, p.w.cols, p.w.block_cols, static_cast<int>(dtype_size(p.w.dtype)),
            p.w.item_count, cuda::multiprocessors(device), cuda::shared_limit(device), few);
        PARED_CHECK(workspace % 16 == 0 && workspace_bytes >= plan.workspace_bytes, "workspace: expected ",
                    plan.workspace_bytes, " aligned bytes, got ", workspace_bytes);
        py::gil_scoped_release unlocked;
        cuda::csr_product(p, plan, device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("w"), py::arg("x"), py::arg("tokens"), py::arg("x_stride"), py::arg("bias"),
      py::arg("activation"), py::arg("y"), py::arg("y_stride"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("few"), py::arg("device"), py::arg("stream"));
}

}  // namespace pared
