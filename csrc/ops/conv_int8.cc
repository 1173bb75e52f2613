// A convolution without im2col, in one of two ways, with the same bits as results.
//
// Channel planes that are large enough to fill vectors: outputs in the lanes, weights broadcast, and nothing
// is transposed.
//
//   for each image: quantise it into planes of words
//     for each thread's share of tiles of up to 96 outputs, or of panels (16 filters) where there are few:
//       for each panel: micro-kernel with all of the reduction, sums in registers; scaled, they are stored in
//       L1
//         bias, activation, to the image's planes
//
// Else the micro-kernel of the linear operation takes neighbouring outputs of a row for its tokens, and what
// lies behind each other in the frame of a tap (or, where taps touch, of a kernel row) for a run of its
// reduction.
//
//   for each image: quantise it into its frame
//     for each thread's share of outputs, or of filters where there are few outputs:
//       for each block of outputs:
//         for each four panels (64 filters):
//           for each K block (32 KB of weights: they stay in L1 while the block's outputs pass):
//             for each tile of up to 6 outputs: micro-kernel, sums in L1 or L2; fetches a share of the next
//             block
//               after the last block: scales, bias, activation; planes are transposed a block at a time
#include "ops/conv_int8.h"

#include <algorithm>
#include <vector>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"
#include "ops/conv_frame.h"
#include "ops/gemm_ahead.h"

namespace pared {
namespace {

constexpr int64_t kBlockUnits = 128;  // of the reduction: 64 filters by 512 bytes, 32 KB
static_assert(kBlockUnits <= kGemmUnits, "a block is one call of the micro-kernel");
constexpr int64_t kBlockOutputs = 192;
constexpr int64_t kMinWorkPerThread = 1 << 22;  // multiply-adds
constexpr int64_t kTileBytes = 40 * 1024;       // of what a tile of planes reads: they stay in L1
// Products in the time that the transposes take for an element of the input or the output.
constexpr int64_t kTransposeProducts = 45;
constexpr int64_t kWidth = kGemmPanels * kInt8Panel;

// Runs of one K block: where they begin in the frame, of outputs 0, and in the weights.
struct KBlock {
  int64_t first_unit, units, run, runs;  // run: index into run_at
};

// Up to kGemmTokens outputs of one row.
struct Tile {
  int64_t output;  // in the plane
  int64_t byte;    // of the frame
  int32_t count;
};

class PixelConvolution {
 public:
  PixelConvolution(const ConvArgs& a, const Int8Packed& w) : a_(a), w_(w), frame_(a, *w.header) {
    const int64_t per_row = w.units();
    for (int64_t g = 0; g < w.groups(); ++g) {
      for (int64_t u = 0, run; u < per_row; u += run) {
        const int64_t at = frame_.unit(g * per_row + u, &run) * kInt8Unit;
        // Long runs are cut, short ones share a block: all of one length, as taps and kernel rows are.
        const int64_t parts = (run + kBlockUnits - 1) / kBlockUnits;
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t k = run * i / parts, units = run * (i + 1) / parts - k;
          if (g == 0) {
            KBlock* last = blocks_.empty() ? nullptr : &blocks_.back();
            if (last && last->units == units && (last->runs + 1) * units <= kBlockUnits) ++last->runs;
            else blocks_.push_back({u + k, units, static_cast<int64_t>(run_at_.size()), 1});
          }
          run_at_.push_back(at + k * kInt8Unit);
        }
      }
      if (g == 0) group_runs_ = static_cast<int64_t>(run_at_.size());
    }
    const bool one_row = frame_.outputs_a_row() == a.out_w;
    const int64_t lines = one_row ? 1 : a.out_h, length = one_row ? a.out_h * a.out_w : a.out_w;
    const int64_t tiles = (length + kGemmTokens - 1) / kGemmTokens;
    step_ = frame_.position_words() * kInt8Unit;
    for (int64_t y = 0; y < lines; ++y)
      for (int64_t i = 0; i < tiles; ++i) {
        // Of nearly equal size: one output alone after a full tile would wait out latencies.
        const int64_t x0 = length * i / tiles, x1 = length * (i + 1) / tiles;
        tiles_.push_back(
            {y * length + x0, (y * frame_.outputs_a_row() + x0) * step_, static_cast<int32_t>(x1 - x0)});
      }
  }

  void run() const {
    thread_local Scratch memory;
    auto* words = memory.get<uint32_t>(frame_.words());
    const auto tiles = static_cast<int64_t>(tiles_.size());
    const int64_t outputs = a_.out_h * a_.out_w, panels = w_.panels();
    const int64_t work = outputs * panels * w_.units() * kInt8Panel * kInt8Unit;
    const int64_t parts = std::min<int64_t>(num_threads(), std::max<int64_t>(1, work / kMinWorkPerThread));
    const bool by_outputs = tiles >= 8 * parts || panels < parts;
    for (int64_t n = 0; n < a_.images; ++n) {
      const float scale = frame_.quantize(n, *w_.activations, words);
      const auto* bytes = reinterpret_cast<const uint8_t*>(words);
      parallel_for(0, parts, 1, [&](int64_t i0, int64_t i1) {
        if (by_outputs) share(n, scale, bytes, tiles * i0 / parts, tiles * i1 / parts, 0, panels);
        else share(n, scale, bytes, 0, tiles, panels * i0 / parts, panels * i1 / parts);
      });
    }
  }

 private:
  // Tiles [t0, t1) by panels [p0, p1), in blocks of outputs.
  void share(int64_t n, float scale, const uint8_t* bytes, int64_t t0, int64_t t1, int64_t p0,
             int64_t p1) const {
    float scales[kGemmTokens];
    std::fill(std::begin(scales), std::end(scales), scale);
    constexpr int64_t kTiles = kBlockOutputs / kGemmTokens;
    const int64_t blocks = (t1 - t0 + kTiles - 1) / kTiles;
    for (int64_t b = 0; b < blocks; ++b) {
      const Tile* first = tiles_.data() + t0 + (t1 - t0) * b / blocks;
      const Tile* last = tiles_.data() + t0 + (t1 - t0) * (b + 1) / blocks;
      for (int64_t p = p0; p < p1;) {
        const int64_t group = p / w_.group_panels();
        const int64_t end = std::min(p1, (group + 1) * w_.group_panels());
        const int panels = static_cast<int>(std::min<int64_t>(kGemmPanels, end - p));
        // What comes next: other panels, or the first ones again for the next outputs.
        const int64_t next = p + panels < p1 ? p + panels : b + 1 < blocks ? p0 : p + panels;
        product(n, scales, bytes, first, last, group, p, panels, next);
        p += panels;
      }
    }
  }

  void product(int64_t n, const float* scales, const uint8_t* bytes, const Tile* first, const Tile* last,
               int64_t group, int64_t panel, int panels, int64_t next_panel) const {
    const Isa isa = active_isa();
    const auto gemm = kernel_for<gemm_u8s8>(isa).fn;
    const auto dequantize = kernel_for<dequantize_store>(isa).fn;
    thread_local Scratch acc_memory, plane_memory;
    auto* acc = acc_memory.get<int32_t>(kBlockOutputs * kWidth);
    // A tile more: planes are transposed 16 outputs at a time.
    auto* planes = plane_memory.get<float>((kBlockOutputs + kPanelGroup) * kWidth);
    const PackedHeader& h = *w_.header;
    const int64_t in_group = (panel - group * w_.group_panels()) * kInt8Panel;
    const int64_t filter = group * w_.group_rows() + in_group, slot = panel * kInt8Panel;
    const auto filters =
        static_cast<int32_t>(std::min<int64_t>(panels * kInt8Panel, w_.group_rows() - in_group));
    const float* bias = a_.bias ? a_.bias + filter : nullptr;
    const int64_t element = dtype_size(a_.dtype), plane = a_.out_h * a_.out_w;
    char* y = static_cast<char*>(a_.y) + n * plane * h.rows * element;
    const bool nchw = a_.layout == ImageLayout::nchw;
    const auto block = [&](int64_t p, int64_t count, const KBlock& k) {
      return GemmBlock{p, count, k.first_unit, k.units * k.runs};
    };
    const int64_t next_panels = std::min<int64_t>(panels, w_.panels() - next_panel);
    for (const KBlock& k : blocks_) {
      const bool done = &k == &blocks_.back();
      const GemmBlock now = block(panel, panels, k), next = done ? block(next_panel, next_panels, blocks_[0])
                                                                 : block(panel, panels, *(&k + 1));
      for (const Tile* t = first; t != last; ++t) {
        int32_t* sums = acc + (t->output - first->output) * kWidth;
        gemm[(t->count - 1) * kGemmPanels + panels - 1](
            {bytes + t->byte, step_,
             w_.weights + panel * w_.panel_bytes() + k.first_unit * kInt8Panel * kInt8Unit, w_.panel_bytes(),
             static_cast<int32_t>(k.units), sums, kWidth, k.first_unit > 0, static_cast<int32_t>(k.runs),
             run_at_.data() + group * group_runs_ + k.run,
             gemm_ahead(w_.weights, w_.panel_bytes(), next, t - first, last - first, now)});
        if (!done) continue;
        DequantizeArgs d{sums,
                         kWidth,
                         w_.compensation + slot,
                         scales,
                         w_.scales + slot,
                         t->count,
                         filters,
                         bias,
                         a_.activation,
                         nullptr,
                         0,
                         DType::f32,
                         0};
        if (nchw) {
          d.y = planes + (t->output - first->output) * kWidth;
          d.y_stride = kWidth;
          // A residual comes before the activation, and is added where planes are stored.
          if (a_.residual != 0) d.activation = Activation::none;
        } else {
          d.residual = a_.residual;
          d.y = y + (t->output * h.rows + filter) * element;
          d.y_stride = h.rows;
          d.dtype = a_.dtype;
        }
        dequantize(d);
      }
    }
    if (!nchw || first == last) return;
    const int64_t outputs = (last - 1)->output + (last - 1)->count - first->output;
    kernel_for<panel_store>(isa).fn({planes, kWidth, static_cast<int32_t>(outputs), filters, nullptr,
                                     a_.residual != 0 ? a_.activation : Activation::none,
                                     y + (filter * plane + first->output) * element, plane, a_.dtype,
                                     a_.residual});
  }

  const ConvArgs& a_;
  const Int8Packed& w_;
  const ConvFrame frame_;
  std::vector<KBlock> blocks_;
  std::vector<int64_t> run_at_;  // [groups][group_runs_], bytes
  int64_t group_runs_ = 0;
  std::vector<Tile> tiles_;
  int64_t step_;  // bytes between neighbouring outputs
};

class PlaneConvolution {
 public:
  PlaneConvolution(const ConvArgs& a, const Int8Packed& w) : a_(a), w_(w), planes_(a, *w.header) {
    vectors_ = (planes_.positions() + kPanelGroup - 1) / kPanelGroup;
    const int64_t most =
        tile_bytes(kConvPlaneVectors) <= kTileBytes ? kConvPlaneVectors : kConvPlaneVectors / 2;
    tiles_ = (vectors_ + most - 1) / most;
    crowded_ = tile_bytes(most) + w.panel_bytes() > kTileBytes;
  }

  // Whether what is computed in vain, where lanes are columns of the frame or nothing, and what a tile costs
  // that L1 does not hold beside a panel, takes less time than the transposes of input and output.
  bool pays() const {
    const int64_t outputs = a_.out_h * a_.out_w, computed = vectors_ * kPanelGroup;
    const int64_t vain = computed + (crowded_ ? computed / 5 : 0) - outputs;
    const int64_t moved = a_.channels * a_.height * a_.width + outputs * w_.header->rows;
    return vain * w_.group_rows() * w_.groups() * w_.units() * kInt8Unit <= kTransposeProducts * moved;
  }

  void run() const {
    thread_local Scratch memory;
    auto* words = memory.get<uint32_t>(planes_.words());
    const int64_t panels = w_.panels();
    const int64_t work = vectors_ * kPanelGroup * panels * w_.units() * kInt8Panel * kInt8Unit;
    const int64_t parts = std::min<int64_t>(num_threads(), std::max<int64_t>(1, work / kMinWorkPerThread));
    const bool by_tiles = tiles_ >= 8 * parts || panels < parts;
    for (int64_t n = 0; n < a_.images; ++n) {
      const float scale = planes_.quantize(n, *w_.activations, words);
      parallel_for(0, parts, 1, [&](int64_t i0, int64_t i1) {
        if (by_tiles) share(n, scale, words, tiles_ * i0 / parts, tiles_ * i1 / parts, 0, panels);
        else share(n, scale, words, 0, tiles_, panels * i0 / parts, panels * i1 / parts);
      });
    }
  }

 private:
  void share(int64_t n, float scale, const uint32_t* words, int64_t t0, int64_t t1, int64_t p0,
             int64_t p1) const {
    const Isa isa = active_isa();
    const auto multiply = kernel_for<conv_planes_u8s8>(isa).fn;
    const auto store = kernel_for<conv_store>(isa).fn;
    constexpr int64_t kTile = kConvPlaneVectors * kPanelGroup;
    alignas(kCacheLine) float scaled[kInt8Panel * kTile];
    const PackedHeader& h = *w_.header;
    const int64_t element = dtype_size(a_.dtype), plane = a_.out_h * a_.out_w,
                  pitch = planes_.outputs_a_row();
    char* y = static_cast<char*>(a_.y) + n * plane * h.rows * element;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t first = vectors_ * t / tiles_ * kPanelGroup,
                    vectors = vectors_ * (t + 1) / tiles_ - first / kPanelGroup;
      ConvSpan spans[kTile];
      int32_t count = 0;
      const int64_t end = std::min(planes_.positions(), first + vectors * kPanelGroup);
      for (int64_t m = first; m < end;) {
        const int64_t row = m / pitch, x = m % pitch, next = std::min(end, (row + 1) * pitch);
        const auto real = static_cast<int32_t>(std::min(a_.out_w - x, next - m));
        if (real > 0) spans[count++] = {static_cast<int32_t>(m - first), real, row * a_.out_w + x};
        m = next;
      }
      if (count == 0) continue;
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t group = p / w_.group_panels(), in_group = p % w_.group_panels() * kInt8Panel;
        const auto filters = static_cast<int32_t>(std::min<int64_t>(kInt8Panel, w_.group_rows() - in_group));
        const int64_t filter = group * w_.group_rows() + in_group, slot = p * kInt8Panel;
        multiply[vectors - 1](
            {words + group * planes_.group_words() * planes_.plane_words() + first, planes_.taps_at().data(),
             static_cast<int32_t>(planes_.taps_at().size()), static_cast<int32_t>(planes_.group_words()),
             planes_.plane_words(), w_.weights + p * w_.panel_bytes(), filters, w_.compensation + slot,
             w_.scales + slot, scale, scaled, kTile, y + (filter * plane + spans[0].offset) * element,
             plane * element,
             (spans[count - 1].offset + spans[count - 1].count - spans[0].offset) * element});
        store({scaled, static_cast<int32_t>(kTile), filters, spans, count,
               a_.bias ? a_.bias + filter : nullptr, a_.activation, y + filter * plane * element, plane,
               a_.dtype, a_.residual});
      }
    }
  }

  // What a tile of so many vectors reads of the image.
  int64_t tile_bytes(int64_t vectors) const {
    return planes_.group_words() * kInt8Unit * planes_.words_read(vectors * kPanelGroup);
  }

  const ConvArgs& a_;
  const Int8Packed& w_;
  const ConvPlanes planes_;
  int64_t vectors_, tiles_;  // of outputs: 16 each, and up to kConvPlaneVectors of those
  bool crowded_;
};

}  // namespace

void conv2d_int8(const ConvArgs& args, const Int8Packed& w) {
  if (args.images == 0 || w.header->rows == 0) return;
  if (args.layout == ImageLayout::nchw)
    if (const PlaneConvolution planes(args, w); planes.pays()) return planes.run();
  PixelConvolution(args, w).run();
}

}  // namespace pared
