// For each tile of up to 64 queries of one head:
//   pack the queries, times scale, into a panel [features][queries]
//   scores [keys][queries] = K times that panel; softmax down the lanes
//   output [features][queries] = V, by columns, times the weights; transposed into rows of the output
//
// The scores of a tile for all keys are kept at once, in L1 for 128 keys and in L2 for 2048: no rescaling
// between blocks of keys. K and V are read where they are.
#include "ops/attention.h"

#include <algorithm>
#include <limits>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {
namespace {

// Floats of a tile's scores that stay near; more keys take narrower tiles.
constexpr int64_t kScores = 128 * 1024;
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
                                          : static_cast<const float*>(a.mask)[at];
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
  const auto multiply = kernel_for<rows_panel_f32>(isa).fn;
  const auto softmax = kernel_for<softmax_columns>(isa).fn;
  const auto store = kernel_for<panel_store>(isa).fn;

  int64_t groups = kAttentionGroups;
  while (groups > 1 && a.keys * groups * kPanelGroup > kScores) groups /= 2;
  const int64_t all = (a.queries + kPanelGroup - 1) / kPanelGroup, tiles = (all + groups - 1) / groups;
  const int64_t items = a.batch * tiles * a.heads;
  const int64_t work = a.queries * a.keys * (a.features + a.out_features) / tiles;  // of an item
  const int64_t grain = std::max<int64_t>(1, kMinWorkPerThread / std::max<int64_t>(1, work));

  // Heads innermost: they share the mask.
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch scores_memory, small_memory, mask_memory;
    MaskPanel mask(mask_memory);
    constexpr int64_t widest = kAttentionGroups * kPanelGroup;
    float* scores = scores_memory.get<float>(a.keys * groups * kPanelGroup);
    float* small = small_memory.get<float>((a.features + a.out_features + 1) * widest);
    float *panel = small, *out = panel + a.features * widest, *inverse = out + a.out_features * widest;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % a.heads, tile = i / a.heads % tiles, batch = i / a.heads / tiles;
      const int64_t g0 = all * tile / tiles, g1 = all * (tile + 1) / tiles;
      const Tile t{g0 * kPanelGroup,
                   static_cast<int32_t>(std::min(a.queries, g1 * kPanelGroup) - g0 * kPanelGroup),
                   static_cast<int32_t>(g1 - g0)};
      const int32_t row = t.groups * kPanelGroup;
      const int64_t keys = a.causal ? std::min(a.keys, t.first + t.queries) : a.keys;

      pack({a.q.at(batch, head, t.first), a.q.position_stride, DType::f32, t.queries, t.groups,
            static_cast<int32_t>(a.features), row, panel});
      for (int64_t j = 0; j < a.features * row; ++j) panel[j] *= a.scale;
      multiply[t.groups - 1]({a.k.at(batch, head / a.shared, 0), a.k.position_stride, false, panel, nullptr,
                              scores, static_cast<int32_t>(keys), a.features});
      if (a.causal)
        for (int64_t k = t.first + 1; k < keys; ++k) std::fill_n(scores + k * row, k - t.first, kMasked);
      softmax({scores, mask.get(a, batch, head, t, keys), inverse, keys, t.groups});
      multiply[t.groups - 1]({a.v.at(batch, head / a.shared, 0), a.v.position_stride, true, scores, inverse,
                              out, static_cast<int32_t>(a.out_features), keys});
      for (int64_t d = 0; d < a.out_features; d += kPanelGroup)
        store({out + d * row, row, static_cast<int32_t>(std::min<int64_t>(kPanelGroup, a.out_features - d)),
               t.queries, nullptr, Activation::none, a.y.at(batch, head, t.first) + d, a.y.position_stride,
               DType::f32});
    }
  });
}

}  // namespace pared
