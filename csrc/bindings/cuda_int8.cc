// The 8-bit products of the CUDA module. Sizes are in elements; python/pared/_cuda_int8.py has checked the
// tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>

#include "bindings/cuda_register.h"
#include "bindings/names.h"
#include "core/check.h"
#include "cuda/device.h"
#include "cuda/int8.h"

namespace py = pybind11;

namespace pared {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void quantize(uintptr_t x, DType dtype, int64_t rows, int64_t cols, int64_t x_stride,
              std::tuple<float, int, int, int> activations, uintptr_t q, int64_t q_stride, uintptr_t scales,
              int device, uintptr_t stream) {
  PARED_CHECK(rows >= 0 && rows < (int64_t{1} << 31), "x: expected fewer than 2^31 rows, got ", rows);
  PARED_CHECK(q % cuda::kInt8Align == 0 && q_stride % cuda::kInt8Align == 0 && q_stride >= cols,
              "q: expected rows at multiples of 16 bytes that hold ", cols, " columns");
  const auto [scale, zero, low, high] = activations;
  cuda::quantize_rows({pointer<const void>(x), dtype, rows, cols, x_stride, scale, zero, low, high,
                       pointer<int8_t>(q), q_stride, pointer<float>(scales)},
                      device, pointer<CUstream_st>(stream));
}

}  // namespace

void register_cuda_int8(py::module_& m) {
  m.attr("INT8_ALIGN") = cuda::kInt8Align;
  m.attr("INT8_TILES") = [] {
    py::list tiles;
    for (const cuda::Int8Tile& t : cuda::kInt8Tiles) tiles.append(py::make_tuple(t.rows, t.columns));
    for (const cuda::Int8WgmmaTile& t : cuda::kInt8WgmmaTiles)
      tiles.append(py::make_tuple(t.rows, t.columns));
    return py::tuple(tiles);
  }();
  m.def(
      "quantize_rows",
      [](uintptr_t x, const std::string& dtype, int64_t rows, int64_t cols, int64_t x_stride,
         std::tuple<float, int, int, int> activations, uintptr_t q, int64_t q_stride, uintptr_t scales,
         int device, uintptr_t stream) {
        const DType type = parse_float_dtype(dtype);
        py::gil_scoped_release unlocked;
        quantize(x, type, rows, cols, x_stride, activations, q, q_stride, scales, device, stream);
      },
      py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("x_stride"),
      py::arg("activations"), py::arg("q"), py::arg("q_stride"), py::arg("scales"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "pad_rows",
      [](uintptr_t x, int64_t rows, int64_t cols, int64_t x_stride, int64_t column_stride, uintptr_t out,
         int64_t out_stride, int device, uintptr_t stream) {
        PARED_CHECK(rows >= 0 && rows < (int64_t{1} << 31), "x: expected fewer than 2^31 rows, got ", rows);
        py::gil_scoped_release unlocked;
        cuda::pad_rows(
            {pointer<const int8_t>(x), rows, cols, x_stride, column_stride, pointer<int8_t>(out), out_stride},
            device, pointer<CUstream_st>(stream));
      },
      py::arg("x"), py::arg("rows"), py::arg("cols"), py::arg("x_stride"), py::arg("column_stride"),
      py::arg("out"), py::arg("out_stride"), py::arg("device"), py::arg("stream"));
  m.def(
      "plan_int8",
      [](int64_t tokens, int64_t outputs, int64_t cols, int multiprocessors) {
        PARED_CHECK(tokens > 0 && outputs > 0 && cols >= 0 && multiprocessors > 0,
                    "tokens, outputs, multiprocessors: expected positive sizes");
        // A product on wgmma needs no workspace and is given one all the same: a few megabytes at most.
        const int forced = cuda::forced_int8_tile();
        const cuda::Int8Plan p = cuda::plan_int8(tokens, outputs, cols, multiprocessors,
                                                 forced < cuda::kInt8TileCount ? forced : -1);
        return py::make_tuple(p.tile, p.tiles_m, p.tiles_n, p.steps, p.splits, p.workspace_bytes);
      },
      py::arg("tokens"), py::arg("outputs"), py::arg("cols"), py::arg("multiprocessors"),
      "(tile, tiles of tokens, tiles of outputs, steps, splits, workspace bytes); no device is touched.");
  m.def(
      "int8_wgmma_tile",
      [](int64_t tokens, int64_t outputs, int multiprocessors) {
        PARED_CHECK(tokens > 0 && outputs > 0 && multiprocessors > 0,
                    "tokens, outputs, multiprocessors: expected positive sizes");
        return cuda::int8_wgmma_tile(tokens, outputs, multiprocessors);
      },
      py::arg("tokens"), py::arg("outputs"), py::arg("multiprocessors"));
  m.def(
      "force_int8_tile",
      [](int tile) {
        constexpr int kTiles = cuda::kInt8TileCount + cuda::kInt8WgmmaTileCount;
        PARED_CHECK(tile >= -1 && tile < kTiles, "tile: expected -1 to ", kTiles - 1, ", got ", tile);
        cuda::force_int8_tile(tile);
      },
      py::arg("tile"));
  m.def("int8_wgmma", &cuda::int8_wgmma, py::arg("device"));
  m.def("multiprocessors", &cuda::multiprocessors, py::arg("device"));
  m.def(
      "int8_product",
      [](uintptr_t a, uintptr_t b, int64_t tokens, int64_t outputs, int64_t cols, int64_t a_stride,
         int64_t b_stride, uintptr_t x_scales, uintptr_t w_scales, uintptr_t correction, uintptr_t bias,
         const std::string& activation, const std::string& dtype, uintptr_t y, int64_t y_stride,
         uintptr_t workspace, int device, uintptr_t stream) {
        PARED_CHECK(tokens >= 0 && outputs >= 0 && cols >= 0, "a, b: expected non-negative sizes");
        for (const auto& [at, stride, name] : {std::tuple{a, a_stride, "a"}, std::tuple{b, b_stride, "b"}})
          PARED_CHECK(at % cuda::kInt8Align == 0 && stride % cuda::kInt8Align == 0 && stride >= cols, name,
                      ": expected rows at multiples of 16 bytes that hold ", cols, " columns");
        PARED_CHECK((x_scales == 0) == (w_scales == 0), "x_scales, w_scales: expected both or neither");
        const DType type = w_scales ? parse_float_dtype(dtype) : DType::i32;
        const Activation function = parse_activation(activation);
        py::gil_scoped_release unlocked;
        cuda::int8_product(
            {pointer<const int8_t>(a), pointer<const int8_t>(b), tokens, outputs, cols, a_stride, b_stride,
             pointer<const float>(x_scales), pointer<const float>(w_scales),
             pointer<const int32_t>(correction), pointer<const float>(bias), function, type, pointer<void>(y),
             y_stride, pointer<uint8_t>(workspace)},
            device, pointer<CUstream_st>(stream));
      },
      py::arg("a"), py::arg("b"), py::arg("tokens"), py::arg("outputs"), py::arg("cols"), py::arg("a_stride"),
      py::arg("b_stride"), py::arg("x_scales"), py::arg("w_scales"), py::arg("correction"), py::arg("bias"),
      py::arg("activation"), py::arg("dtype"), py::arg("y"), py::arg("y_stride"), py::arg("workspace"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace pared
