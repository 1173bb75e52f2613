#include "ops/linear.h"
#include "ops/panel_product.h"

namespace pared {
namespace {

// A tile's tokens, quantised: rows of words, and their scales.
struct QuantizedTile {
  Scratch words_memory, scales_memory;
  int64_t stride = 0;  // words between tokens
  uint32_t* words = nullptr;
  float* scales = nullptr;

  // An odd number of cache lines a token: those of 16 tokens, which are read together, lie in different sets.
  void reserve(int64_t units) {
    stride = static_cast<int64_t>(round_up(units, kPanelGroup) | kPanelGroup);
    words = words_memory.get<uint32_t>(stride * kPanelMaxGroups * kPanelGroup);
    scales = scales_memory.get<float>(kPanelMaxGroups * kPanelGroup);
  }
};

}  // namespace

void linear_bsr8(const LinearArgs& args, const Bsr8Packed& w) {
  const Isa isa = active_isa();
  const auto quantize = kernel_for<quantize_u8>(isa).fn;
  const auto pack = kernel_for<panel_pack>(isa).fn;
  const auto dequantize = kernel_for<panel_dequantize>(isa).fn;
  const auto store = kernel_for<panel_store>(isa).fn;
  const PackedHeader& h = *w.panel.header;
  const int64_t element = dtype_size(args.dtype);
  const ActivationRange& range = *w.activations;
  thread_local QuantizedTile tile;
  panel_product(
      w.panel, word_kernels(h), cut_panel_tiles(h, args.tokens),
      [&](const PanelTile& t) {
        tile.reserve(w.panel.units);
        const int32_t cols = static_cast<int32_t>(h.cols);
        quantize({static_cast<const char*>(args.x) + t.first * args.x_stride * element, args.x_stride,
                  args.dtype, t.positions, cols, range.scale, range.zero, range.low, range.high,
                  reinterpret_cast<uint8_t*>(tile.words), tile.stride * kInt8Unit, tile.scales});
        std::fill(tile.scales + t.positions, tile.scales + t.vectors * kPanelGroup, 0.0f);
      },
      [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, int32_t* panel) -> const int32_t* {
        // Words are moved, not computed with: the packer of float32 serves.
        pack({tile.words + k0, tile.stride, DType::f32, t.positions, t.vectors, units, stride,
              reinterpret_cast<float*>(panel)});
        return panel;
      },
      [&](const PanelTile& t, int64_t row0, int32_t rows, int32_t* acc, int32_t acc_stride) {
        dequantize({acc, acc_stride, rows, t.vectors * kPanelGroup, range.zero, w.sums + row0,
                    w.scales + row0, tile.scales});
        store({reinterpret_cast<const float*>(acc), acc_stride, rows, t.positions,
               args.bias ? args.bias + row0 : nullptr, args.activation,
               static_cast<char*>(args.y) + (t.first * args.y_stride + row0) * element, args.y_stride,
               args.dtype});
      });
}

}  // namespace pared
