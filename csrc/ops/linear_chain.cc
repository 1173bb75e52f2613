#include "ops/linear_chain.h"

#include <algorithm>

#include "ops/panel_product.h"

namespace pared {
namespace {

namespace detail = panel_product_detail;

// Vectors of tokens that go through all stages together: a tile of a linear weight, which is read once for
// each tile however many go together.
constexpr int64_t kTogether = 4;

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

// All tokens through one stage after the other, each shared out to all threads.
void run_stages(const ChainArgs& a, const std::vector<ChainStage>& stages) {
  const Isa isa = active_isa();
  const auto pack_rows = kernel_for<panel_pack>(isa).fn;
  const auto store_rows = kernel_for<panel_store>(isa).fn;
  const auto store_panel = kernel_for<conv_store>(isa).fn;
  const int64_t element = dtype_size(a.dtype);

  std::vector<Handed> handed;
  handed.reserve(stages.size() - 1);
  size_t largest = 0;
  for (size_t i = 1; i < stages.size(); ++i) {
    handed.emplace_back(stages[i].w, a.tokens);
    largest = std::max(largest, handed.back().floats());
  }
  // Two buffers in turn, each with room behind it for any 16-bit offset.
  const size_t room = round_up(largest + detail::kPanelElements, kCacheLine / sizeof(float));
  thread_local Scratch memory;
  float* buffers = memory.get<float>(std::min<size_t>(2, handed.size()) * room);
  for (size_t i = 0; i < handed.size(); ++i) handed[i].place(buffers + i % 2 * room);

  for (size_t i = 0; i < stages.size(); ++i) {
    const ChainStage& stage = stages[i];
    const Handed* from = i > 0 ? &handed[i - 1] : nullptr;
    const Handed* to = i < handed.size() ? &handed[i] : nullptr;
    csr_panel_product(
        stage.w, to ? cut_panel_tiles(*stage.w.header, a.tokens) : cut_row_tiles(*stage.w.header, a.tokens),
        [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, float* panel) -> const float* {
          if (from) return from->block(t, k0);
          pack_rows({static_cast<const char*>(a.x) + (t.first * a.x_stride + k0) * element, a.x_stride,
                     a.dtype, t.positions, t.vectors, units, stride, panel});
          return panel;
        },
        [&](const PanelTile& t, int64_t row0, int32_t rows, const float* acc, int32_t acc_stride) {
          const float* bias = stage.bias ? stage.bias + row0 : nullptr;
          if (!to)
            return store_rows({acc, acc_stride, rows, t.positions, bias, stage.activation,
                               static_cast<char*>(a.y) + (t.first * a.y_stride + row0) * element, a.y_stride,
                               a.dtype});
          // The lanes behind the last token as well: the next stage computes with them, and what memory held
          // before may be denormal, which is slow.
          ConvSpan spans[kPanelMaxGroups];
          const int32_t n = to->spans(t.first, t.vectors * kPanelGroup, spans);
          store_panel({acc, acc_stride, rows, spans, n, bias, stage.activation,
                       to->data() + row0 * to->row_stride(), to->row_stride(), DType::f32});
        });
  }
}

// A group of tokens through all stages, by one thread. The sums of a stage lie as the next one's panel does,
// so bias and activation are applied where they are and nothing is moved. Stages go in pairs: some hundred
// outputs of the first are computed, and taken by the second at once, from the second-level cache.
class TokenGroup {
 public:
  TokenGroup(const ChainArgs& a, const std::vector<ChainStage>& stages, const PanelTile& tile)
      : a_(a), stages_(stages), tile_(tile), stride_(tile.vectors * kPanelGroup) {
    panels_.unit_stride = stride_;
    panels_.store_groups = groups_a_store(stride_);
  }

  void run() {
    const size_t single = stages_.size() % 2;  // a first stage without a partner
    int64_t slice = 0, sums = single ? stages_[0].w.header->rows : 0;
    for (size_t i = single; i < stages_.size(); i += 2) {
      slice = std::max(slice, slice_blocks(i) * stages_[i + 1].w.header->block_k);
      sums = std::max(sums, stages_[i + 1].w.header->rows);
    }
    const bool pack_ahead = !single && slice_blocks(0) < detail::panel_blocks(stages_[1].w);
    const int64_t inputs = pack_ahead ? stages_[0].w.header->cols : 0;
    thread_local Scratch memory;
    panel_ = memory.get<float>(room(inputs) + room(slice) + 2 * room(sums));
    slice_ = panel_ + room(inputs);
    float *free = slice_ + room(slice), *taken = free + room(sums);
    if (pack_ahead) {
      pack(0, inputs, panel_);
      input_ = panel_;
    }
    const auto done = [&] {
      input_ = free;
      std::swap(free, taken);
    };
    if (single) {
      run_stage(0, 0, stages_[0].w.groups(), 0, detail::panel_blocks(stages_[0].w), nullptr, 0, free);
      done();
    }
    for (size_t i = single; i < stages_.size(); i += 2) {
      run_pair(i, free);
      done();
    }
  }

 private:
  // Outputs of a first stage that are computed together, and what a pair may take of the second-level cache.
  static constexpr int64_t kSliceUnits = 512, kPairBytes = 768 * 1024;

  // K blocks of the second stage of pair (i, i + 1) that a slice fills: all of them where what is read and
  // written again for each slice would not stay in the cache beside it.
  int64_t slice_blocks(size_t i) const {
    const CsrPacked &first = stages_[i].w, &second = stages_[i + 1].w;
    const int64_t all = detail::panel_blocks(second), block_k = second.header->block_k;
    const int64_t units = first.header->cols + second.header->rows + kSliceUnits;
    if (units * stride_ * int64_t{sizeof(float)} > kPairBytes || block_k % kCsrGroup != 0) return all;
    return std::clamp<int64_t>(kSliceUnits / block_k, 1, all);
  }

  // Floats of a panel: whole row groups, and behind them room for any 16-bit offset.
  int64_t room(int64_t units) const {
    return static_cast<int64_t>(round_up(units, kCsrGroup)) * stride_ + int64_t{detail::kPanelElements};
  }

  void pack(int64_t k0, int64_t units, float* to) const {
    const auto kernel = kernel_for<panel_pack>(active_isa()).fn;
    const int64_t at = (tile_.first * a_.x_stride + k0) * dtype_size(a_.dtype);
    kernel({static_cast<const char*>(a_.x) + at, a_.x_stride, a_.dtype, tile_.positions, tile_.vectors,
            static_cast<int32_t>(units), static_cast<int32_t>(stride_), to});
  }

  void run_pair(size_t i, float* sums) {
    const CsrPacked &first = stages_[i].w, &second = stages_[i + 1].w;
    const int64_t all = detail::panel_blocks(second), block_k = second.header->block_k;
    const int64_t step = slice_blocks(i);
    for (int64_t b = 0; b < all; b += step) {
      const int64_t u0 = b * block_k, u1 = std::min<int64_t>((b + step) * block_k, first.header->rows);
      run_stage(i, u0 / kCsrGroup, (u1 + kCsrGroup - 1) / kCsrGroup, 0, detail::panel_blocks(first), input_,
                0, slice_);
      run_stage(i + 1, 0, second.groups(), b, std::min(all, b + step), slice_, u0, sums);
    }
  }

  // K blocks [b0, b1) of row groups [g0, g1) of a stage, with the panel `x` of units from k0 on, or without
  // one the inputs, packed on the way. The sums stay at `sums`, or go to y with the last block of the last
  // stage.
  void run_stage(size_t i, int64_t g0, int64_t g1, int64_t b0, int64_t b1, const float* x, int64_t k0,
                 float* sums) {
    const CsrPacked& w = stages_[i].w;
    const int64_t pass = detail::groups_per_pass(tile_);
    for (int64_t g = g0; g < g1; g += pass)
      detail::run_tile(
          w, float_kernels(*w.header), tile_, panels_, g, std::min(g + pass, g1), b0, b1,
          [&](const PanelTile&, int64_t k, int32_t units, int32_t, float* panel) -> const float* {
            if (x) return x + (k - k0) * stride_;
            pack(k, units, panel);
            return panel;
          },
          [&](const PanelTile&, int64_t row0, int32_t rows, float* acc, int32_t) {
            finish(i, row0, rows, acc);
          },
          panel_, sums + (g - g0) * kCsrGroup * stride_);
  }

  void finish(size_t i, int64_t row0, int32_t rows, float* acc) const {
    const ChainStage& stage = stages_[i];
    const float* bias = stage.bias ? stage.bias + row0 : nullptr;
    const auto stride = static_cast<int32_t>(stride_);
    if (i + 1 < stages_.size()) {
      // The lanes behind the last token as well: the next stage computes with them.
      const ConvSpan all{0, stride, 0};
      kernel_for<conv_store>(active_isa())
          .fn({acc, stride, rows, &all, 1, bias, stage.activation, acc, stride_, DType::f32});
      return;
    }
    const int64_t at = (tile_.first * a_.y_stride + row0) * dtype_size(a_.dtype);
    kernel_for<panel_store>(active_isa())
        .fn({acc, stride, rows, tile_.positions, bias, stage.activation, static_cast<char*>(a_.y) + at,
             a_.y_stride, a_.dtype});
  }

  const ChainArgs& a_;
  const std::vector<ChainStage>& stages_;
  const PanelTile tile_;
  const int64_t stride_;
  PanelTiles panels_;
  float *panel_ = nullptr, *slice_ = nullptr;
  const float* input_ = nullptr;  // of the stages to come
};

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
  const int64_t vectors = (a.tokens + kPanelGroup - 1) / kPanelGroup, threads = num_threads();
  // Whole groups of tokens for each thread, as many groups as a multiple of the threads: then no thread waits
  // between stages. With too few tokens for that the stages are shared out one after the other.
  int64_t groups = (vectors + kTogether - 1) / kTogether;
  groups = (groups + threads - 1) / threads * threads;
  const bool any_stride = std::all_of(stages.begin(), stages.end(), [](const ChainStage& s) {
    return takes_stride(*s.w.header, kPanelGroup);
  });
  if (!any_stride || (threads > 1 && vectors / groups < kTogether * 3 / 4)) return run_stages(a, stages);
  parallel_for(0, groups, 1, [&](int64_t g0, int64_t g1) {
    for (int64_t g = g0; g < g1; ++g) {
      const int64_t v0 = vectors * g / groups, v1 = vectors * (g + 1) / groups;
      const int64_t first = v0 * kPanelGroup, end = std::min(a.tokens, v1 * kPanelGroup);
      TokenGroup(a, stages, {first, static_cast<int32_t>(end - first), static_cast<int32_t>(v1 - v0)}).run();
    }
  });
}

}  // namespace pared
