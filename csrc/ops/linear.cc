#include "ops/linear.h"

#include "ops/panel_product.h"

namespace pared {
namespace {

// Several weights read a tile's panel where it is packed once for all of the reduction, if that fits a
// second-level cache. One weight, or a longer reduction, packs a K block when it comes to it, in the
// first-level cache.
constexpr int64_t kWholePanelBytes = 512 * 1024;

}  // namespace

void linear_csr(const LinearArgs& args, const CsrPacked& w) {
  linear_shared({args.x, args.x_stride, args.tokens, args.dtype},
                std::vector<SharedOutput<CsrPacked>>{
                    {w, args.bias, args.activation, args.y, args.y_stride, args.residual}});
}

bool share_inputs(const CsrPacked& a, const CsrPacked& b) {
  const PackedHeader &g = *a.header, &h = *b.header;
  return g.cols == h.cols && g.tile == h.tile && g.entry_rows == h.entry_rows;
}

void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<CsrPacked>>& outputs) {
  const Isa isa = active_isa();
  const auto pack = kernel_for<panel_pack>(isa).fn;
  const auto store = kernel_for<panel_store>(isa).fn;
  const int64_t element = dtype_size(in.dtype);
  std::vector<CsrPacked> weights;
  for (const auto& o : outputs) weights.push_back(o.w);
  const PackedHeader& h = *weights[0].header;
  const PanelTiles panels = cut_row_tiles(h, in.tokens);
  const int64_t floats = h.cols * panels.unit_stride;
  const bool whole = outputs.size() > 1 && floats * int64_t{sizeof(float)} <= kWholePanelBytes;
  const auto pack_units = [&](const PanelTile& t, int64_t k0, int64_t units, float* panel) {
    pack({static_cast<const char*>(in.x) + (t.first * in.x_stride + k0) * element, in.x_stride, in.dtype,
          t.positions, t.vectors, static_cast<int32_t>(units), static_cast<int32_t>(panels.unit_stride),
          panel});
  };
  thread_local Scratch memory;
  panel_products(
      weights.data(), static_cast<int64_t>(weights.size()), float_kernels(h), panels,
      [&](const PanelTile& t) {
        if (whole) pack_units(t, 0, h.cols, memory.get<float>(floats + panel_product_detail::kPanelElements));
      },
      [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, float* panel) -> const float* {
        if (whole) return memory.get<float>(floats + panel_product_detail::kPanelElements) + k0 * stride;
        pack_units(t, k0, units, panel);
        return panel;
      },
      [&](int64_t i, const PanelTile& t, int64_t row0, int32_t rows, const float* acc, int32_t acc_stride) {
        const auto& o = outputs[i];
        store({acc, acc_stride, rows, t.positions, o.bias ? o.bias + row0 : nullptr, o.activation,
               static_cast<char*>(o.y) + (t.first * o.y_stride + row0) * element, o.y_stride, in.dtype,
               o.residual});
      });
}

}  // namespace pared
