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
  linear_shared(
      {args.x, args.x_stride, args.tokens, args.dtype},
      std::vector<SharedOutput<Bsr8Packed>>{{w, args.bias, args.activation, args.y, args.y_stride}});
}

bool share_inputs(const Bsr8Packed& a, const Bsr8Packed& b) {
  const PackedHeader &g = *a.panel.header, &h = *b.panel.header;
  return g.cols == h.cols && g.tile == h.tile && g.entry_rows == h.entry_rows &&
         *a.activations == *b.activations;
}

void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<Bsr8Packed>>& outputs) {
  const Isa isa = active_isa();
  const auto quantize = kernel_for<quantize_u8>(isa).fn;
  const auto pack = kernel_for<panel_pack>(isa).fn;
  const auto dequantize = kernel_for<panel_dequantize>(isa).fn;
  const auto store = kernel_for<panel_store>(isa).fn;
  const PanelPacked<int32_t>& first = outputs[0].w.panel;
  const int64_t element = dtype_size(in.dtype);
  const ActivationRange& range = *outputs[0].w.activations;
  std::vector<PanelPacked<int32_t>> panels;
  for (const auto& o : outputs) panels.push_back(o.w.panel);
  thread_local QuantizedTile tile;
  panel_products(
      panels.data(), static_cast<int64_t>(panels.size()), word_kernels(*first.header),
      cut_row_tiles(*first.header, in.tokens),
      [&](const PanelTile& t) {
        tile.reserve(first.units);
        quantize({static_cast<const char*>(in.x) + t.first * in.x_stride * element, in.x_stride, in.dtype,
                  t.positions, static_cast<int32_t>(first.header->cols), range.scale, range.zero, range.low,
                  range.high, reinterpret_cast<uint8_t*>(tile.words), tile.stride * kInt8Unit, tile.scales});
        std::fill(tile.scales + t.positions, tile.scales + t.vectors * kPanelGroup, 0.0f);
      },
      [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, int32_t* panel) -> const int32_t* {
        // Words are moved, not computed with: the packer of float32 serves.
        pack({tile.words + k0, tile.stride, DType::f32, t.positions, t.vectors, units, stride,
              reinterpret_cast<float*>(panel)});
        return panel;
      },
      [&](int64_t i, const PanelTile& t, int64_t row0, int32_t rows, int32_t* acc, int32_t acc_stride) {
        const auto& o = outputs[i];
        dequantize({acc, acc_stride, rows, t.vectors * kPanelGroup, range.zero, o.w.sums + row0,
                    o.w.scales + row0, tile.scales});
        store({reinterpret_cast<const float*>(acc), acc_stride, rows, t.positions,
               o.bias ? o.bias + row0 : nullptr, o.activation,
               static_cast<char*>(o.y) + (t.first * o.y_stride + row0) * element, o.y_stride, in.dtype});
      });
}

}  // namespace pared
