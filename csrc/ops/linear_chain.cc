#include "ops/linear_chain.h"

#include <algorithm>

#include "ops/panel_product.h"

namespace pared {
namespace {

// Tokens that go through all stages together: a tile of a linear weight, which is read once for each tile
// however many go together. What lies between two stages then stays in the second-level cache, or close to
// it.
constexpr int64_t kTogether = 64;

// What one stage leaves for the next: the next one's tiles, each a panel [units][stride] of its own.
class Handed {
 public:
  Handed(const CsrPacked& next, int64_t tokens)
      : panels_(cut_panel_tiles(*next.header, tokens)), units_(next.header->cols) {}

  size_t floats() const { return panels_.tiles.size() * units_ * row_stride(); }
  void place(float* memory) { memory_ = memory; }

  // For the next stage: unit k0 of a tile's panel.
  const float* block(const PanelTile& t, int64_t k0) const {
    return memory_ + (index_of(t.first) * units_ + k0) * row_stride();
  }

  // For the stage before, whose tiles may be cut otherwise: where positions [first, first + count) of a row
  // lie, elements from row 0 of the first panel.
  int32_t spans(int64_t first, int32_t count, ConvSpan* out) const {
    int32_t n = 0;
    for (int32_t m = 0; m < count; ++n) {
      const int64_t i = index_of(first + m);
      const PanelTile& t = panels_.tiles[i];
      const int64_t at = first + m - t.first;
      const int32_t run = static_cast<int32_t>(std::min<int64_t>(t.vectors * kPanelGroup - at, count - m));
      out[n] = {m, run, i * units_ * row_stride() + at};
      m += run;
    }
    return n;
  }
  int64_t row_stride() const { return panels_.unit_stride; }
  float* data() const { return memory_; }

 private:
  int64_t index_of(int64_t position) const {
    int64_t i = static_cast<int64_t>(panels_.tiles.size()) - 1;
    while (panels_.tiles[i].first > position) --i;
    return i;
  }

  PanelTiles panels_;
  int64_t units_;
  float* memory_ = nullptr;
};

// Tokens [begin, end) through all stages.
void run_stages(const ChainArgs& a, const std::vector<ChainStage>& stages, int64_t begin, int64_t end) {
  const Isa isa = active_isa();
  const auto pack_rows = kernel_for<panel_pack>(isa).fn;
  const auto store_rows = kernel_for<panel_store>(isa).fn;
  const auto store_panel = kernel_for<conv_store>(isa).fn;
  const int64_t element = dtype_size(a.dtype), tokens = end - begin;

  std::vector<Handed> handed;
  handed.reserve(stages.size() - 1);
  size_t largest = 0;
  for (size_t i = 1; i < stages.size(); ++i) {
    handed.emplace_back(stages[i].w, tokens);
    largest = std::max(largest, handed.back().floats());
  }
  // Two buffers in turn, each with room behind it for any 16-bit offset.
  const size_t room = round_up(largest + panel_product_detail::kPanelElements, kCacheLine / sizeof(float));
  thread_local Scratch memory;
  float* buffers = memory.get<float>(std::min<size_t>(2, handed.size()) * room);
  for (size_t i = 0; i < handed.size(); ++i) handed[i].place(buffers + i % 2 * room);

  for (size_t i = 0; i < stages.size(); ++i) {
    const ChainStage& stage = stages[i];
    const Handed* from = i > 0 ? &handed[i - 1] : nullptr;
    const Handed* to = i < handed.size() ? &handed[i] : nullptr;
    csr_panel_product(
        stage.w, to ? cut_panel_tiles(*stage.w.header, tokens) : cut_row_tiles(*stage.w.header, tokens),
        [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, float* panel) -> const float* {
          if (from) return from->block(t, k0);
          pack_rows({static_cast<const char*>(a.x) + ((begin + t.first) * a.x_stride + k0) * element,
                     a.x_stride, a.dtype, t.positions, t.vectors, units, stride, panel});
          return panel;
        },
        [&](const PanelTile& t, int64_t row0, int32_t rows, const float* acc, int32_t acc_stride) {
          const float* bias = stage.bias ? stage.bias + row0 : nullptr;
          if (!to)
            return store_rows({acc, acc_stride, rows, t.positions, bias, stage.activation,
                               static_cast<char*>(a.y) + ((begin + t.first) * a.y_stride + row0) * element,
                               a.y_stride, a.dtype});
          // The lanes behind the last token as well: the next stage computes with them, and what memory held
          // before may be denormal, which is slow.
          ConvSpan spans[kPanelMaxGroups];
          const int32_t n = to->spans(t.first, t.vectors * kPanelGroup, spans);
          store_panel({acc, acc_stride, rows, spans, n, bias, stage.activation,
                       to->data() + row0 * to->row_stride(), to->row_stride(), DType::f32});
        });
  }
}

// Bytes of rows between two stages that stay in a second-level cache beside the weights that pass through it,
// and the tokens that are worth reading those weights for.
constexpr int64_t kRowBytes = 512 * 1024;
constexpr int64_t kMinRowTokens = 48, kMaxRowTokens = 192;

// Tokens [begin, end) through all stages.
void run_row_stages(const ChainArgs& a, const std::vector<RowStage>& stages, int64_t widest, int64_t begin,
                    int64_t end) {
  const int64_t element = dtype_size(a.dtype), tokens = end - begin,
                stride = static_cast<int64_t>(odd_lines(widest, element));
  thread_local Scratch memory;
  char* buffers = memory.get<char>(std::min<size_t>(2, stages.size() - 1) * tokens * stride * element);
  const char* x = static_cast<const char*>(a.x) + begin * a.x_stride * element;
  int64_t x_stride = a.x_stride;
  for (size_t i = 0; i < stages.size(); ++i) {
    const bool last = i + 1 == stages.size();
    char* y = last ? static_cast<char*>(a.y) + begin * a.y_stride * element
                   : buffers + i % 2 * tokens * stride * element;
    const int64_t y_stride = last ? a.y_stride : stride;
    linear({x, x_stride, tokens, a.dtype, stages[i].bias, stages[i].activation, y, y_stride}, stages[i].w);
    x = y;
    x_stride = y_stride;
  }
}

}  // namespace

void linear_chain_rows(const ChainArgs& a, const std::vector<RowStage>& stages) {
  if (a.tokens == 0) return;
  int64_t widest = 0;
  for (size_t i = 0; i + 1 < stages.size(); ++i)
    widest = std::max<int64_t>(widest, header_of(stages[i].w).rows);
  const int64_t threads = num_threads();
  const size_t element = dtype_size(a.dtype);
  const auto bytes = static_cast<int64_t>(odd_lines(widest, element) * element);
  const int64_t most = std::clamp(kRowBytes / bytes, kMinRowTokens, kMaxRowTokens);
  // As many blocks as a multiple of the threads. With too few tokens for that the stages are shared out one
  // after the other.
  int64_t blocks = (a.tokens + most - 1) / most;
  blocks = (blocks + threads - 1) / threads * threads;
  if (blocks == 1 || a.tokens / blocks < kMinRowTokens / 2)
    return run_row_stages(a, stages, widest, 0, a.tokens);
  parallel_for(0, blocks, 1, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b)
      run_row_stages(a, stages, widest, a.tokens * b / blocks, a.tokens * (b + 1) / blocks);
  });
}

void linear_chain_csr(const ChainArgs& a, const std::vector<ChainStage>& stages) {
  if (a.tokens == 0) return;
  const int64_t vectors = (a.tokens + kPanelGroup - 1) / kPanelGroup;
  const int64_t threads = num_threads();
  // Whole groups of tokens for each thread, as many groups as a multiple of the threads: then no thread waits
  // between stages. With too few tokens for that the stages are shared out one after the other.
  int64_t groups = (vectors * kPanelGroup + kTogether - 1) / kTogether;
  groups = (groups + threads - 1) / threads * threads;
  if (vectors / groups < kTogether / kPanelGroup * 3 / 4) return run_stages(a, stages, 0, a.tokens);
  parallel_for(0, groups, 1, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g)
      run_stages(a, stages, vectors * g / groups * kPanelGroup,
                 std::min(a.tokens, vectors * (g + 1) / groups * kPanelGroup));
  });
}

}  // namespace pared
