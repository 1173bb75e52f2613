#include "cuda/tensor_map.h"

#include <stdexcept>
#include <string>

#include "cuda/device.h"

namespace pared::cuda {

CUtensorMap tensor_map(const void* base, int64_t row_bytes, int64_t rows, int64_t stride, int box_rows,
                       const char* what) {
#ifdef PARED_CUDA_EMULATED
  // What the driver refuses.
  constexpr int64_t kSizes = int64_t{1} << 32, kStrides = int64_t{1} << 40;
  if (!base || reinterpret_cast<uintptr_t>(base) % 16 || row_bytes < 1 || row_bytes > kSizes || rows < 1 ||
      rows > kSizes || stride % 16 || stride < row_bytes || stride >= kStrides || box_rows < 1 ||
      box_rows > 256)
    throw std::runtime_error(std::string(what) + ": cuTensorMapEncodeTiled: invalid value");
  return {base, row_bytes, rows, stride, box_rows};
#else
  // The driver is no library that is linked: without one the module loads all the same.
  static void* const encode = [what] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                           &found),
          what);
    if (found != cudaDriverEntryPointSuccess || !function)
      throw std::runtime_error(std::string(what) + ": the driver has no cuTensorMapEncodeTiled");
    return function;
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {128, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(what) + ": cuTensorMapEncodeTiled: driver error " +
                             std::to_string(static_cast<int>(status)));
  return map;
#endif
}

}  // namespace pared::cuda
