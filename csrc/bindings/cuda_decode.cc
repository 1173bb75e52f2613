// The products of few tokens of the CUDA module. python/pared/_cuda_decode.py has checked the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "bindings/cuda_register.h"
#include "bindings/names.h"
#include "core/check.h"
#include "cuda/decode.h"
#include "cuda/device.h"

namespace py = pybind11;

namespace pared {
namespace {

// blocks, offsets, format, dtype, outputs, cols, largest block in bytes
using DecodeTuple = std::tuple<uintptr_t, uintptr_t, std::string, std::string, int64_t, int64_t, int64_t>;

cuda::DecodeFormat parse_format(const std::string& format) {
  if (format == "bitmap16") return cuda::DecodeFormat::bitmap16;
  if (format == "bitmap8") return cuda::DecodeFormat::bitmap8;
  if (format == "dense8") return cuda::DecodeFormat::dense8;
  if (format == "pairs16") return cuda::DecodeFormat::pairs16;
  throw ValueError(str("format: expected one of bitmap16, pairs16, bitmap8, dense8, got '", format, "'"));
}

void require_sizes(int64_t outputs, int64_t cols) {
  // Blocks are counted by grids.
  constexpr int64_t kMost = int64_t{1} << 31, kSize = cuda::kDecodeBlock;
  const int64_t down = (outputs + kSize - 1) / kSize, across = (cols + kSize - 1) / kSize;
  PARED_CHECK(outputs >= 0 && cols >= 0 && down < kMost && across < kMost && down * across < kMost,
              "w: expected fewer than 2^31 blocks of 64 x 64, got ", outputs, " x ", cols);
}

// values, outputs, cols, stride, format, mask: as cuda::DecodeDense
using DenseTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, std::string, uintptr_t>;

cuda::DecodeDense dense(const DenseTuple& t) {
  const auto& [values, outputs, cols, stride, format, mask] = t;
  require_sizes(outputs, cols);
  return {reinterpret_cast<const void*>(values), outputs, cols, stride, parse_format(format),
          reinterpret_cast<const uint8_t*>(mask)};
}

cuda::DecodeWeight weight(const DecodeTuple& t) {
  const auto& [blocks, offsets, format, dtype, outputs, cols, largest] = t;
  cuda::DecodeWeight w{reinterpret_cast<const uint8_t*>(blocks),
                       reinterpret_cast<const uint32_t*>(offsets),
                       parse_format(format),
                       parse_float_dtype(dtype),
                       outputs,
                       cols,
                       largest};
  if (w.dtype == DType::f32) throw TypeError("dtype: expected float16 or bfloat16, got float32");
  PARED_CHECK(blocks % 16 == 0, "blocks: expected memory aligned to 16 bytes");
  require_sizes(outputs, cols);
  return w;
}

void require_tokens(int64_t tokens) {
  PARED_CHECK(tokens >= 1 && tokens <= cuda::kDecodeMaxTokens, "tokens: expected 1 to ",
              cuda::kDecodeMaxTokens, ", got ", tokens);
}

}  // namespace

void register_cuda_decode(py::module_& m) {
  m.def("bulk_copies", &cuda::bulk_copies, py::arg("device"));
  m.def("shared_limit", &cuda::shared_limit, py::arg("device"));
  m.def(
      "plan_decode",
      [](int64_t tokens, int64_t outputs, int64_t cols, int64_t largest_block, const std::string& format,
         int multiprocessors, int64_t shared_limit) {
        require_tokens(tokens);
        const cuda::DecodePlan p = cuda::plan_decode(tokens, outputs, cols, largest_block,
                                                     parse_format(format), multiprocessors, shared_limit);
        py::dict d;
        d["tokens"] = p.tokens;
        d["block_rows"] = p.block_rows;
        d["block_cols"] = p.block_cols;
        d["splits"] = p.splits;
        d["stages"] = p.stages;
        d["digit_pitch"] = p.digit_pitch;
        d["shared_bytes"] = p.shared_bytes;
        d["workspace_bytes"] = p.workspace_bytes;
        return d;
      },
      py::arg("tokens"), py::arg("outputs"), py::arg("cols"), py::arg("largest_block"), py::arg("format"),
      py::arg("multiprocessors"), py::arg("shared_limit"), "What the host decides; no device is touched.");
  m.def(
      "decode_workspace",
      [](int64_t tokens, int64_t outputs, int64_t cols, int64_t largest_block, const std::string& format,
         int multiprocessors, int64_t shared_limit) {
        PARED_CHECK(tokens >= 1, "tokens: expected at least 1, got ", tokens);
        return cuda::decode_workspace_bytes(tokens, outputs, cols, largest_block, parse_format(format),
                                            multiprocessors, shared_limit);
      },
      py::arg("tokens"), py::arg("outputs"), py::arg("cols"), py::arg("largest_block"), py::arg("format"),
      py::arg("multiprocessors"), py::arg("shared_limit"),
      "Bytes for a product of any number of tokens; no device is touched.");
  m.def(
      "decode_product",
      [](const DecodeTuple& w, uintptr_t x, int64_t tokens, int64_t x_stride, uintptr_t scales,
         uintptr_t bias, const std::string& activation, uintptr_t y, int64_t y_stride, uintptr_t workspace,
         int64_t workspace_bytes, bool bulk, int device, uintptr_t stream) {
        PARED_CHECK(tokens >= 1, "tokens: expected at least 1, got ", tokens);
        const cuda::DecodeProduct p{weight(w),
                                    reinterpret_cast<const void*>(x),
                                    tokens,
                                    x_stride,
                                    reinterpret_cast<const float*>(scales),
                                    reinterpret_cast<const float*>(bias),
                                    parse_activation(activation),
                                    reinterpret_cast<void*>(y),
                                    y_stride,
                                    reinterpret_cast<uint8_t*>(workspace),
                                    bulk};
        const int64_t needed =
            cuda::decode_workspace_bytes(tokens, p.w.outputs, p.w.cols, p.w.largest_block, p.w.format,
                                         cuda::multiprocessors(device), cuda::shared_limit(device));
        PARED_CHECK(workspace % 16 == 0 && workspace_bytes >= needed, "workspace: expected ", needed,
                    " aligned bytes, got ", workspace_bytes);
        py::gil_scoped_release unlocked;
        cuda::decode_product(p, device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("w"), py::arg("x"), py::arg("tokens"), py::arg("x_stride"), py::arg("scales"), py::arg("bias"),
      py::arg("activation"), py::arg("y"), py::arg("y_stride"), py::arg("workspace"),
      py::arg("workspace_bytes"), py::arg("bulk"), py::arg("device"), py::arg("stream"));
  m.def(
      "decode_pack_sizes",
      [](const DenseTuple& w, uintptr_t units, uintptr_t largest, int device, uintptr_t stream) {
        const cuda::DecodeDense given = dense(w);
        PARED_CHECK(units && largest, "units, largest: expected device memory, got null");
        py::gil_scoped_release unlocked;
        cuda::decode_pack_sizes(given, reinterpret_cast<int64_t*>(units), reinterpret_cast<int64_t*>(largest),
                                device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("w"), py::arg("units"), py::arg("largest"), py::arg("device"), py::arg("stream"),
      "Sizes of a bitmap's blocks in 16 bytes, and the largest; w: values, outputs, cols, stride, format, "
      "mask.");
  m.def(
      "decode_pack",
      [](const DenseTuple& w, uintptr_t offsets, uintptr_t blocks, int device, uintptr_t stream) {
        const cuda::DecodeDense given = dense(w);
        PARED_CHECK(blocks && blocks % 16 == 0, "blocks: expected memory aligned to 16 bytes");
        PARED_CHECK(offsets || given.format == cuda::DecodeFormat::dense8,
                    "offsets: expected device memory, got null");
        py::gil_scoped_release unlocked;
        cuda::decode_pack(given, reinterpret_cast<const uint32_t*>(offsets),
                          reinterpret_cast<uint8_t*>(blocks), device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("w"), py::arg("offsets"), py::arg("blocks"), py::arg("device"), py::arg("stream"));
  m.def(
      "decode_expand",
      [](const DecodeTuple& w, uintptr_t scales, uintptr_t out, int device, uintptr_t stream) {
        const cuda::DecodeWeight given = weight(w);
        py::gil_scoped_release unlocked;
        cuda::decode_expand(given, reinterpret_cast<const float*>(scales), reinterpret_cast<void*>(out),
                            device, reinterpret_cast<cudaStream_t>(stream));
      },
      py::arg("w"), py::arg("scales"), py::arg("out"), py::arg("device"), py::arg("stream"));
}

}  // namespace pared
