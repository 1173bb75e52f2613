// The sparse panel micro-kernel: a register tile of one output row by VECTORS * 16 positions. Each non-zero
// is one broadcast and VECTORS * 16 / width multiply-adds with a memory operand. What limits it: loads (one
// for every multiply-add plus the broadcast), then, below about ten non-zeros a row and block, the
// accumulator's load and store and the mispredicted end of the inner loop.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// UNROLL non-zeros with accumulators of their own: with few vectors the multiply-add's latency (4 cycles, two
// a cycle) would otherwise leave most issue slots empty.
template <class S, int VECTORS, int UNROLL>
void csr_panel_rows(const CsrPanelArgs& args) {
  constexpr int N = VECTORS * kPanelGroup / S::width;
  using V = typename S::V;
  const float* values = args.values;
  const uint16_t* offsets = args.offsets;
  const char* panel = reinterpret_cast<const char*>(args.panel);
  float* acc = args.acc;
  for (int r = 0; r < args.rows; ++r, acc += VECTORS * kPanelGroup) {
    int left = args.counts[r];
    V sum[UNROLL][N];
    for (int v = 0; v < N; ++v) sum[0][v] = args.accumulate ? S::load(acc + v * S::width) : S::zero();
    for (int u = 1; u < UNROLL; ++u)
      for (int v = 0; v < N; ++v) sum[u][v] = S::zero();
    for (; left >= UNROLL; left -= UNROLL, values += UNROLL, offsets += UNROLL) {
      for (int u = 0; u < UNROLL; ++u) {
        const float* x = reinterpret_cast<const float*>(panel + offsets[u]);
        const V w = S::set1(values[u]);
        for (int v = 0; v < N; ++v) sum[u][v] = S::fma(w, S::load(x + v * S::width), sum[u][v]);
      }
    }
    if constexpr (UNROLL > 1) {
      for (; left > 0; --left, ++values, ++offsets) {
        const float* x = reinterpret_cast<const float*>(panel + *offsets);
        const V w = S::set1(*values);
        for (int v = 0; v < N; ++v) sum[0][v] = S::fma(w, S::load(x + v * S::width), sum[0][v]);
      }
    }
    for (int v = 0; v < N; ++v) {
      V total = sum[0][v];
      for (int u = 1; u < UNROLL; ++u) total = S::fma(S::set1(1.0f), sum[u][v], total);
      S::store(acc + v * S::width, total);
    }
  }
}

}  // namespace
}  // namespace pared
