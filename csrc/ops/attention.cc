// For each tile of up to 64 queries of one head:
//   pack the queries, times scale, into a panel [features][queries]
//   for each block of 128 keys:
//     scores [keys][queries] = K times that panel; softmax down the lanes, of the keys so far
//     output [features][queries] = what it was, rescaled, + V, by columns, times the weights
//   output transposed into rows
//
// The scores of a block lie in L1 beside its values, and a tile's output in L2. Float32 keys and values are
// read where they are; those of 16 bits are widened a block at a time.
#include "ops/attention.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/aligned.h"
#include "core/parallel.h"
#include "formats/values.h"
#include "kernels/registry.h"

namespace pared {
namespace {

constexpr int64_t kBlockKeys = 128;
// Below this many multiply-adds (10 us) a second thread does not pay.
constexpr int64_t kMinWorkPerThread = 1 << 19;

constexpr float kMasked = -std::numeric_limits<float>::infinity();

struct Tile {
  int64_t first;
  int32_t queries, groups;
};

// The mask of one tile as a panel, kept while consecutive heads share it.
class MaskPanel {
 public:
  explicit MaskPanel(Scratch& memory) : panel_(memory) {}
  const float* get(const AttentionArgs& a, int64_t batch, int64_t head, const Tile& t, int64_t keys) {
    if (!a.mask) return nullptr;
    const int64_t offset = batch * a.mask_strides[0] + head * a.mask_strides[1] + t.first * a.mask_strides[2];
    const int64_t row = t.groups * kPanelGroup;
    float* panel = panel_.get<float>(keys * row);
    if (offset == offset_ && t.queries == queries_ && keys == keys_) return panel;
    offset_ = offset, queries_ = t.queries, keys_ = keys;
    const int64_t by_query = a.mask_strides[2], by_key = a.mask_strides[3];
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t m = 0; m < row; ++m) {
        const int64_t at = offset + std::min<int64_t>(m, t.queries - 1) * by_query + k * by_key;
        panel[k * row + m] = a.mask_bytes ? (static_cast<const uint8_t*>(a.mask)[at] ? 0.0f : kMasked)
                                          : value_at(a.mask, at, a.mask_dtype);
      }
    return panel;
  }

 private:
  Scratch& panel_;
  int64_t offset_ = -1, queries_ = 0, keys_ = 0;
};

}  // namespace

void attention(const AttentionArgs& a) {
  if (a.batch * a.heads * a.queries * a.out_features == 0) return;
  const Isa isa = active_isa();
  const auto pack = kernel_for<panel_pack>(isa).fn;
  const auto widen = kernel_for<rows_widen>(isa).fn;
  const auto multiply = kernel_for<rows_panel_f32>(isa).fn;
  const auto softmax = kernel_for<softmax_columns>(isa).fn;
  const auto store = kernel_for<panel_store>(isa).fn;

  const int64_t all = (a.queries + kPanelGroup - 1) / kPanelGroup;
  const int64_t tiles = (all + kAttentionGroups - 1) / kAttentionGroups;
  const int64_t items = a.batch * tiles * a.heads;
  const int64_t work = a.queries * a.keys * (a.features + a.out_features) / tiles;  // of an item
  const int64_t grain = std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work));
  const bool wide = a.dtype == DType::f32;
  const int64_t most = std::min(a.keys, kBlockKeys);

  // Heads innermost: they share the mask.
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch memory, widened_memory, mask_memory;
    MaskPanel mask(mask_memory);
    constexpr int64_t widest = kAttentionGroups * kPanelGroup;
    // The store reads whole groups of rows.
    const int64_t out_rows = static_cast<int64_t>(round_up(a.out_features, kPanelGroup));
    float* scores = memory.get<float>((most + a.features + out_rows + 4) * widest);
    float *panel = scores + most * widest, *out = panel + a.features * widest;
    float *largest = out + out_rows * widest, *sum = largest + widest, *keep = sum + widest,
          *inverse = keep + widest;
    const int64_t padded = round_up(std::max(a.features, a.out_features), kPanelGroup);
    float* wider = wide ? nullptr : widened_memory.get<float>(most * padded);
    // Rows of K or V as float32, and the distance between them.
    const auto rows_of = [&](const Heads& h, int64_t batch, int64_t head, int64_t key, int64_t keys,
                             int64_t features) -> std::pair<const float*, int64_t> {
      const void* from = h.at(batch, head / a.shared, key, a.dtype);
      if (wide) return {static_cast<const float*>(from), h.position_stride};
      widen({from, h.position_stride, a.dtype, static_cast<int32_t>(keys), static_cast<int32_t>(features),
             static_cast<int32_t>(round_up(features, kPanelGroup)), wider, static_cast<int32_t>(padded)});
      return {wider, padded};
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % a.heads, tile = i / a.heads % tiles, batch = i / a.heads / tiles;
      const int64_t g0 = all * tile / tiles, g1 = all * (tile + 1) / tiles;
      const Tile t{g0 * kPanelGroup,
                   static_cast<int32_t>(std::min(a.queries, g1 * kPanelGroup) - g0 * kPanelGroup),
                   static_cast<int32_t>(g1 - g0)};
      const int32_t row = t.groups * kPanelGroup;
      const int64_t keys = a.causal ? std::min(a.keys, t.first + t.queries) : a.keys;
      const float* masked = mask.get(a, batch, head, t, keys);

      pack({a.q.at(batch, head, t.first, a.dtype), a.q.position_stride, a.dtype, t.queries, t.groups,
            static_cast<int32_t>(a.features), row, panel});
      for (int64_t j = 0; j < a.features * row; ++j) panel[j] *= a.scale;
      int64_t k0 = 0;
      do {
        const int64_t n = std::min(kBlockKeys, keys - k0);
        const auto [k, k_stride] = rows_of(a.k, batch, head, k0, n, a.features);
        multiply[t.groups - 1](
            {k, k_stride, false, panel, nullptr, nullptr, scores, static_cast<int32_t>(n), a.features});
        if (a.causal)
          for (int64_t j = std::max<int64_t>(0, t.first + 1 - k0); j < n; ++j)
            std::fill_n(scores + j * row, std::min<int64_t>(row, k0 + j - t.first), kMasked);
        softmax({scores, masked ? masked + k0 * row : nullptr, largest, sum, keep, inverse, n, t.groups,
                 k0 == 0});
        const auto [v, v_stride] = rows_of(a.v, batch, head, k0, n, a.out_features);
        multiply[t.groups - 1]({v, v_stride, true, scores, k0 == 0 ? nullptr : keep,
                                k0 + n == keys ? inverse : nullptr, out, static_cast<int32_t>(a.out_features),
                                n});
        k0 += n;
      } while (k0 < keys);
      for (int64_t d = 0; d < a.out_features; d += kPanelGroup)
        store({out + d * row, row, static_cast<int32_t>(std::min<int64_t>(kPanelGroup, a.out_features - d)),
               t.queries, nullptr, Activation::none,
               static_cast<char*>(a.y.at(batch, head, t.first, a.dtype)) + d * dtype_size(a.dtype),
               a.y.position_stride, a.dtype});
    }
  });
}

}  // namespace pared
