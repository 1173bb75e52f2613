// The image's frame (ops/conv_frame.h) is what the panel is packed from: with an output row as long as the
// frame's (columns too many are not stored), neighbouring outputs of a whole tile read words at one distance,
// so that the packer of the linear operation packs a tap's channels in one call.
#include "ops/conv_bsr8.h"

#include "ops/conv_frame.h"
#include "ops/panel_product.h"

namespace pared {
void conv2d_bsr8(const ConvArgs& a, const Bsr8Packed& w) {
  const PackedHeader& h = *w.panel.header;
  if (a.images == 0 || h.rows == 0) return;
  const Isa isa = active_isa();
  const auto pack = kernel_for<panel_pack>(isa).fn;
  const auto dequantize = kernel_for<panel_dequantize>(isa).fn;
  const auto store_planes = kernel_for<conv_store>(isa).fn;
  const auto store_pixels = kernel_for<panel_store>(isa).fn;
  const ConvFrame frame(a, h);
  const int64_t element = dtype_size(a.dtype), plane = a.out_h * a.out_w, a_row = frame.outputs_a_row();
  thread_local Scratch memory;
  uint32_t* words = memory.get<uint32_t>(frame.words());
  for (int64_t n = 0; n < a.images; ++n) {
    char* y = static_cast<char*>(a.y) + n * plane * h.rows * element;
    const float scale = frame.quantize(n, *w.activations, words);
    alignas(kCacheLine) float scales[kPanelMaxGroups * kPanelGroup];
    std::fill(std::begin(scales), std::end(scales), scale);
    panel_product(
        w.panel, word_kernels(h), cut_panel_tiles(h, frame.positions()), [](const PanelTile&) {},
        [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, int32_t* panel) -> const int32_t* {
          for (int64_t u = k0, run; u < k0 + units; u += run) {
            const uint32_t* from = words + frame.unit(u, &run) + t.first * frame.position_words();
            run = std::min(run, k0 + units - u);
            pack({from, frame.position_words(), DType::f32, t.positions, t.vectors, static_cast<int32_t>(run),
                  stride, reinterpret_cast<float*>(panel + (u - k0) * stride)});
          }
          return panel;
        },
        [&](const PanelTile& t, int64_t row0, int32_t rows, int32_t* acc, int32_t acc_stride) {
          dequantize({acc, acc_stride, rows, t.vectors * kPanelGroup, w.activations->zero, w.sums + row0,
                      w.scales + row0, scales});
          const auto* sums = reinterpret_cast<const float*>(acc);
          const float* bias = a.bias ? a.bias + row0 : nullptr;
          ConvSpan spans[kPanelMaxGroups * kPanelGroup];
          int32_t count = 0;
          for (int64_t m = t.first; m < t.first + t.positions;) {
            const int64_t oy = m / a_row, ox = m % a_row;
            const int64_t end = std::min(t.first + t.positions, (oy + 1) * a_row);
            const int32_t real = static_cast<int32_t>(std::min(a.out_w - ox, end - m));
            if (real > 0) spans[count++] = {static_cast<int32_t>(m - t.first), real, oy * a.out_w + ox};
            m = end;
          }
          if (a.layout == ImageLayout::nchw)
            return store_planes({sums, acc_stride, rows, spans, count, bias, a.activation,
                                 y + row0 * plane * element, plane, a.dtype, a.residual});
          for (int32_t i = 0; i < count; ++i)
            store_pixels({sums + spans[i].first, acc_stride, rows, spans[i].count, bias, a.activation,
                          y + (spans[i].offset * h.rows + row0) * element, h.rows, a.dtype, a.residual});
        });
  }
}

}  // namespace pared
