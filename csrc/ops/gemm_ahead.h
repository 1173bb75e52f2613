// What the int8 micro-kernel fetches beside its products (kernels/int8_types.h, GemmAhead).
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace pared {

constexpr int64_t kGemmLine = kInt8Panel * kInt8Unit;

// A K block of some panels: units [k, k + units).
struct GemmBlock {
  int64_t panel, panels, k, units;
};

// Group g's share of the block that comes next, for the `units` steps of its products: of all its panels
// where there are few groups, else of one. The weights of a layer that ran long ago come from memory, whose
// rate only an even stream of requests attains.
inline GemmAhead gemm_ahead(const int8_t* weights, int64_t panel_bytes, const GemmBlock& next, int64_t g,
                            int64_t groups, const GemmBlock& now) {
  // One group alone has a load for every six products at best; a thinner tile is bound by those.
  if (groups == 1 || now.units == 0 || next.panels < now.panels) return {};
  const bool all = groups < now.panels;
  const int64_t panel = all ? 0 : g * now.panels / groups;
  const int64_t g0 = all ? 0 : (groups * panel + now.panels - 1) / now.panels;
  const int64_t g1 = all ? groups : (groups * (panel + 1) + now.panels - 1) / now.panels;
  const int64_t from = next.units * (g - g0) / (g1 - g0), to = next.units * (g - g0 + 1) / (g1 - g0);
  return {weights + (next.panel + panel) * panel_bytes + (next.k + from) * kGemmLine, panel_bytes,
          static_cast<int32_t>(((to - from) * kGemmLine + now.units - 1) / now.units),
          static_cast<int32_t>(all ? now.panels : 1)};
}

}  // namespace pared
