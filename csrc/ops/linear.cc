#include "ops/linear.h"

#include "ops/panel_product.h"

namespace pared {

void linear_csr(const LinearArgs& args, const CsrPacked& w) {
  const Isa isa = active_isa();
  const auto pack = kernel_for<panel_pack>(isa).fn;
  const auto store = kernel_for<panel_store>(isa).fn;
  const int64_t element = dtype_size(args.dtype);
  csr_panel_product(
      w, cut_panel_tiles(*w.header, args.tokens),
      [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, float* panel) {
        pack({static_cast<const char*>(args.x) + (t.first * args.x_stride + k0) * element, args.x_stride,
              args.dtype, t.positions, t.vectors, units, stride, panel});
        return panel;
      },
      [&](const PanelTile& t, int64_t row0, int32_t rows, const float* acc, int32_t acc_stride) {
        store({acc, acc_stride, rows, t.positions, args.bias ? args.bias + row0 : nullptr, args.activation,
               static_cast<char*>(args.y) + (t.first * args.y_stride + row0) * element, args.y_stride,
               args.dtype, args.residual});
      });
}

}  // namespace pared
