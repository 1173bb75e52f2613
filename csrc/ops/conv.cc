// Three ways into the panel product, none of which materialises an im2col matrix:
//   nchw: what a tile of output positions reads is gathered into L1 for each K block, as strips that the taps
//     of a kernel share (conv_strips.h) or an element for each tap (conv_pack); the product is already in the
//     output's order (conv_store). Strided convolutions first split each plane into the phases of the
//     stride (conv_split), a few images at a time: in a phase neighbouring outputs read neighbouring
//     elements, and rows follow each other without a gap, as they do without a stride. 16-bit planes become
//     float32 so;
//   nhwc, 1x1: pixels are tokens, so it is the linear operation; with a stride, or padding, on the pixels
//     that the output uses, copied together first;
//   nhwc, larger kernels: each pixel is read kh * kw times, so images are transposed to planes once, a few at
//     a time, and gathered as in nchw; the epilogue transposes back.
#include "ops/conv.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "ops/conv_strips.h"
#include "ops/linear.h"
#include "ops/panel_product.h"

namespace pared {
namespace {

// Planes of a few images at a time: beyond the second-level cache, well inside the last.
constexpr int64_t kPlaneFloats = int64_t{2} << 20;
// Deepest transpose that panel_pack does in one call.
constexpr int64_t kTransposeUnits = 256;
// Below this many elements to a thread, copying in parallel does not pay.
constexpr int64_t kCopyGrain = int64_t{1} << 15;

int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

int64_t tap_row(const ConvArgs& a, int i) { return i * a.dilation_h - a.pad_top; }
int64_t tap_column(const ConvArgs& a, int j) { return j * a.dilation_w - a.pad_left; }

// A float32 image without strides, as it is.
Planes planes_of(const ConvArgs& a, int kh, int kw) {
  Planes planes{
      static_cast<const float*>(a.x), a.image_stride, a.channel_stride, a.width, a.height * a.width, {}, {}};
  const auto add = [](TapAxis& axis, int64_t shift, int64_t size) {
    axis.phase.push_back(0);
    axis.shift.push_back(shift);
    axis.size.push_back(size);
  };
  for (int i = 0; i < kh; ++i) add(planes.rows, tap_row(a, i), a.height);
  for (int j = 0; j < kw; ++j) add(planes.columns, tap_column(a, j), a.width);
  return planes;
}

// The phases of a stride that some tap reads: a tap reads phase `of` at `shift` elements from the output.
struct Phases {
  std::vector<int64_t> distinct;
  std::vector<int64_t> of, shift;

  void add(int64_t tap, int64_t stride) {
    shift.push_back(floor_div(tap, stride));
    const int64_t phase = tap - shift.back() * stride;
    const auto at = std::find(distinct.begin(), distinct.end(), phase);
    of.push_back(at - distinct.begin());
    if (at == distinct.end()) distinct.push_back(phase);
  }
};

class SplitPlanes {
 public:
  SplitPlanes(const ConvArgs& a, int kh, int kw) : a_(a) {
    for (int i = 0; i < kh; ++i) rows_.add(tap_row(a, i), a.stride_h);
    for (int j = 0; j < kw; ++j) columns_.add(tap_column(a, j), a.stride_w);
    const int64_t width = ceil_div(a.width, a.stride_w), height = ceil_div(a.height, a.stride_h);
    // As wide as the output where that costs little: a tile of positions is then one run in memory.
    pitch_ = width <= a.out_w && a.out_w <= 2 * width ? a.out_w : width;
    // Rows are written as whole vectors.
    phase_stride_ = static_cast<int64_t>(round_up(height * pitch_ + kPanelGroup - 1, kPanelGroup));
    channel_stride_ = phase_stride_ * phases();
    // A multiple of the page would put all channels of a tile into the same few sets of the L1 cache.
    if (channel_stride_ % 1024 == 0) channel_stride_ += kPanelGroup;
  }

  int64_t image_floats() const { return channel_stride_ * a_.channels; }

  // Images [n0, n1) to `to`.
  Planes split(int64_t n0, int64_t n1, float* to) const {
    const auto kernel = kernel_for<conv_split>(active_isa()).fn;
    const int64_t element = dtype_size(a_.dtype);
    parallel_for(0, (n1 - n0) * a_.channels, std::max<int64_t>(1, kCopyGrain / (a_.height * a_.width)),
                 [&](int64_t p0, int64_t p1) {
                   for (int64_t p = p0; p < p1; ++p) {
                     const int64_t n = n0 + p / a_.channels, c = p % a_.channels;
                     // Every second row and the like is no pattern that a processor foresees. Phases of the
                     // same rows share their cache lines.
                     const int64_t ahead = p + 1 < p1 ? a_.channel_stride : 0;
                     float* plane = to + p * channel_stride_;
                     for (int64_t r : rows_.distinct)
                       for (int64_t q : columns_.distinct) {
                         const int64_t at = n * a_.image_stride + c * a_.channel_stride + r * a_.width + q;
                         kernel({static_cast<const char*>(a_.x) + at * element, a_.dtype, a_.stride_w,
                                 a_.stride_h * a_.width, pitch_, ceil_div(a_.height - r, a_.stride_h),
                                 ceil_div(a_.width - q, a_.stride_w),
                                 q == columns_.distinct.front() ? ahead : 0, plane});
                         // What memory held before may be denormal, which is slow to multiply.
                         std::fill(plane + ceil_div(a_.height - r, a_.stride_h) * pitch_,
                                   plane + phase_stride_, 0.0f);
                         plane += phase_stride_;
                       }
                   }
                 });
    Planes planes{to, image_floats(), channel_stride_, pitch_, phase_stride_, {}, {}};
    const auto axis = [](const Phases& p, int64_t phase_stride, int64_t size, int64_t stride) {
      TapAxis out;
      for (size_t i = 0; i < p.of.size(); ++i) {
        out.phase.push_back(p.of[i] * phase_stride);
        out.shift.push_back(p.shift[i]);
        out.size.push_back(ceil_div(size - p.distinct[p.of[i]], stride));
      }
      return out;
    };
    planes.rows =
        axis(rows_, phase_stride_ * static_cast<int64_t>(columns_.distinct.size()), a_.height, a_.stride_h);
    planes.columns = axis(columns_, phase_stride_, a_.width, a_.stride_w);
    return planes;
  }

 private:
  int64_t phases() const { return static_cast<int64_t>(rows_.distinct.size() * columns_.distinct.size()); }

  const ConvArgs& a_;
  Phases rows_, columns_;
  int64_t pitch_, phase_stride_, channel_stride_;
};

// Where output positions read: the same for every channel, so computed once a call, and for each tile once.
class ConvGeometry {
 public:
  ConvGeometry(const ConvArgs& a, int kh, int kw, const Planes& planes)
      : images_(a.images), out_h_(a.out_h), out_w_(a.out_w), kh_(kh), kw_(kw), planes_(planes) {
    flat_ = out_w_ == planes_.pitch;
    int64_t height = a.height, width = a.width;
    const bool unit_stride = a.stride_h == 1 && a.stride_w == 1;
    if (kh == 1 && kw == 1 && flat_ && unit_stride && out_h_ == height && out_w_ == width) {
      width *= height;  // the plane is one row
      out_w_ = width;
      height = out_h_ = 1;
    }
    for (int i = 0; i < kh; ++i) rows_.push_back(valid(height, out_h_, a.stride_h, -tap_row(a, i)));
    for (int j = 0; j < kw; ++j) columns_.push_back(valid(width, out_w_, a.stride_w, -tap_column(a, j)));
    for (int i = 0; i < kh; ++i)
      for (int j = 0; j < kw; ++j) tap_offsets_.push_back(planes.tap_offset(i, j));
  }

  int64_t plane_positions() const { return out_h_ * out_w_; }
  int64_t positions() const { return images_ * plane_positions(); }

  // What conv_pack needs for one tile.
  struct Tile {
    std::vector<ConvRun> runs;
    std::vector<uint16_t> lanes;  // [taps][runs]
    std::vector<uint16_t> run_lanes, row_lanes, column_lanes;
  };

  void describe(const PanelTile& t, Tile& out) const {
    const int vectors = t.vectors;
    out.runs.clear();
    out.run_lanes.clear();
    out.row_lanes.assign(static_cast<size_t>(kh_) * vectors, 0);
    out.column_lanes.assign(static_cast<size_t>(kw_) * vectors, 0);
    int32_t m = 0;
    while (m < t.positions) {
      const int64_t p = t.first + m, image = p / plane_positions(), in_plane = p % plane_positions();
      const int64_t oy = in_plane / out_w_, ox = in_plane % out_w_;
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(out_w_ - ox, t.positions - m));
      for (int i = 0; i < kh_; ++i)
        if (rows_[i].begin <= oy && oy < rows_[i].end) set_lanes(&out.row_lanes[i * vectors], m, m + count);
      for (int j = 0; j < kw_; ++j) {
        const int64_t b = std::max(columns_[j].begin, ox), e = std::min(columns_[j].end, ox + count);
        if (b < e)
          set_lanes(&out.column_lanes[j * vectors], static_cast<int32_t>(m + b - ox),
                    static_cast<int32_t>(m + e - ox));
      }
      // In flat planes the next output row continues where this one ends in the input too.
      const bool continues = flat_ && m > 0 && in_plane > 0;
      const int64_t source = image * planes_.image_stride + oy * planes_.pitch + ox;
      for (int32_t v = m / kPanelGroup; v * kPanelGroup < m + count; ++v) {
        const int32_t b = std::max(m, v * kPanelGroup), e = std::min(m + count, (v + 1) * kPanelGroup);
        const uint16_t bits = static_cast<uint16_t>(((1u << (e - b)) - 1u) << (b - v * kPanelGroup));
        if (continues && out.runs.back().vector == v) {
          out.run_lanes.back() |= bits;
        } else {
          out.runs.push_back({source + static_cast<int64_t>(v) * kPanelGroup - m, v});
          out.run_lanes.push_back(bits);
        }
      }
      m += count;
    }
    const size_t n = out.runs.size();
    out.lanes.resize(static_cast<size_t>(kh_) * kw_ * n);
    uint16_t* lanes = out.lanes.data();
    for (int i = 0; i < kh_; ++i)
      for (int j = 0; j < kw_; ++j)
        for (size_t r = 0; r < n; ++r) {
          const int32_t v = out.runs[r].vector;
          *lanes++ = out.run_lanes[r] & out.row_lanes[i * vectors + v] & out.column_lanes[j * vectors + v];
        }
  }

  ConvPackArgs pack_args(const PanelTile& t, const Tile& tile, int64_t k0, int32_t units, int32_t stride,
                         float* panel) const {
    return {planes_.x,
            planes_.channel_stride,
            static_cast<int32_t>(tap_offsets_.size()),
            tap_offsets_.data(),
            tile.runs.data(),
            static_cast<int32_t>(tile.runs.size()),
            tile.lanes.data(),
            k0,
            units,
            t.vectors,
            stride,
            panel};
  }

 private:
  struct Range {
    int64_t begin, end;
  };
  // Outputs o in [0, outputs) whose input o * stride - shift lies in [0, size).
  static Range valid(int64_t size, int64_t outputs, int64_t stride, int64_t shift) {
    return {std::clamp<int64_t>(ceil_div(shift, stride), 0, outputs),
            std::clamp<int64_t>(ceil_div(size + shift, stride), 0, outputs)};
  }
  static void set_lanes(uint16_t* vectors, int32_t begin, int32_t end) {
    for (int32_t v = begin / kPanelGroup; v * kPanelGroup < end; ++v) {
      const int32_t b = std::max(begin - v * kPanelGroup, 0),
                    e = std::min(end - v * kPanelGroup, kPanelGroup);
      vectors[v] |= static_cast<uint16_t>(((1u << (e - b)) - 1u) << b);
    }
  }

  int64_t images_, out_h_, out_w_;
  int kh_, kw_;
  const Planes& planes_;
  bool flat_;
  std::vector<Range> rows_, columns_;  // by kernel row, by kernel column
  std::vector<int64_t> tap_offsets_;
};

// Whether a 1x1 kernel can multiply planes where they lie: a unit of the reduction is a channel, its vectors
// of positions are aligned vectors of the plane. Strides by which the channels of a tile fall into less than
// all sets of the L1 cache, sixteen lines and their multiples, are left to be packed.
bool are_panels(const ConvArgs& a, const PackedHeader& h, const Planes& planes) {
  const auto whole = [](int64_t elements) { return elements % kPanelGroup == 0; };
  const int64_t plane = a.out_h * a.out_w;
  return h.kh == 1 && h.kw == 1 && h.entry_rows == 1 && a.pad_top == 0 && a.pad_left == 0 &&
         (a.out_h - 1) * a.stride_h < a.height && (a.out_w - 1) * a.stride_w < a.width &&
         planes.pitch == a.out_w && static_cast<int64_t>(round_up(plane, kPanelGroup)) <= planes.readable &&
         reinterpret_cast<uintptr_t>(planes.x) % kCacheLine == 0 && whole(planes.channel_stride) &&
         (a.images == 1 || whole(planes.image_stride)) && planes.channel_stride % (16 * kPanelGroup) != 0 &&
         planes.channel_stride < int64_t{1} << 31 && takes_stride(h, planes.channel_stride);
}

// A thread's description of the tile it works on, made once for each tile: identified by the call, since
// threads outlive it.
template <class Geometry>
class TileKeeper {
 public:
  explicit TileKeeper(const Geometry& geometry) : geometry_(geometry), call_(++calls()) {}
  const typename Geometry::Tile& of(const PanelTile& t) const {
    thread_local typename Geometry::Tile tile;
    thread_local uint64_t tile_call = 0;
    thread_local int64_t tile_first = 0;
    if (tile_call != call_ || tile_first != t.first) {
      geometry_.describe(t, tile);
      tile_call = call_;
      tile_first = t.first;
    }
    return tile;
  }

 private:
  static std::atomic<uint64_t>& calls() {
    static std::atomic<uint64_t> count{0};
    return count;
  }
  const Geometry& geometry_;
  const uint64_t call_;
};

// A tile's share of the outputs that lies together in a plane: positions [first, first + count) of the tile
// are those from `position` on of the image.
struct OutputSpan {
  int32_t first, count;
  int64_t image, position;
};
inline constexpr int kMaxSpans = kPanelMaxGroups * kPanelGroup;

// The product of some images' planes; `store` takes finished tiles as spans, images counted from `image0`.
template <class Store>
void product(const ConvArgs& args, const CsrPacked& w, const Planes& planes, int64_t image0,
             const Store& store) {
  const int64_t plane = args.out_h * args.out_w;
  const auto store_run = [&](const PanelTile& t, int64_t row0, int32_t rows, const float* acc,
                             int32_t acc_stride) {
    OutputSpan spans[kMaxSpans];
    int32_t n = 0;
    for (int32_t m = 0; m < t.positions; m += spans[n++].count) {
      const int64_t image = (t.first + m) / plane, at = (t.first + m) % plane;
      spans[n] = {m, static_cast<int32_t>(std::min<int64_t>(plane - at, t.positions - m)), image0 + image,
                  at};
    }
    store(spans, n, row0, rows, acc, acc_stride);
  };
  if (are_panels(args, *w.header, planes)) {
    PanelTiles panels = cut_panel_tiles(*w.header, plane, args.images);
    panels.unit_stride = planes.channel_stride;
    panels.in_place = true;
    return csr_panel_product(
        w, panels,
        [&](const PanelTile& t, int64_t k0, int32_t, int32_t, float*) {
          return planes.x + t.first / plane * planes.image_stride + t.first % plane +
                 k0 * planes.channel_stride;
        },
        store_run);
  }
  if (w.code.taps && ConvStrips::pay(args.images, args.out_h, args.out_w, args.stride_h > 1)) {
    const ConvStrips strips(planes, args.images, args.out_h, args.out_w);
    const TileKeeper<ConvStrips> tiles(strips);
    const auto pack = kernel_for<conv_strips>(active_isa()).fn;
    return csr_panel_product(
        w, strips.tiles(),
        [&](const PanelTile& t, int64_t k0, int32_t units, int32_t, float* panel) {
          pack(strips.pack_args(tiles.of(t), k0 / w.code.taps, units / w.code.taps, panel));
          return panel;
        },
        [&](const PanelTile& t, int64_t row0, int32_t rows, const float* acc, int32_t acc_stride) {
          OutputSpan spans[kMaxSpans];
          int32_t n = 0;
          strips.for_spans(t, [&](int32_t first, int32_t count, int64_t image, int64_t position) {
            spans[n++] = {first, count, image0 + image, position};
          });
          store(spans, n, row0, rows, acc, acc_stride);
        });
  }
  const ConvGeometry geometry(args, w.header->kh, w.header->kw, planes);
  const TileKeeper<ConvGeometry> described(geometry);
  const auto pack = kernel_for<conv_pack>(active_isa()).fn;
  csr_panel_product(
      w, cut_panel_tiles(*w.header, geometry.positions()),
      [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, float* panel) {
        pack(geometry.pack_args(t, described.of(t), k0, units, stride, panel));
        return panel;
      },
      store_run);
}

// The product of NCHW images; `store` takes finished tiles.
template <class Store>
void product_of_images(const ConvArgs& a, const CsrPacked& w, const Store& store) {
  const int kh = w.header->kh, kw = w.header->kw;
  if (a.dtype == DType::f32 && a.stride_h == 1 && a.stride_w == 1)
    return product(a, w, planes_of(a, kh, kw), 0, store);
  thread_local Scratch memory;
  const SplitPlanes planes(a, kh, kw);
  const int64_t step =
      std::clamp<int64_t>(kPlaneFloats / std::max<int64_t>(1, planes.image_floats()), 1, a.images);
  float* scratch = memory.get<float>(step * planes.image_floats());
  for (int64_t n = 0; n < a.images; n += step) {
    ConvArgs some = a;
    some.images = std::min(step, a.images - n);
    product(some, w, planes.split(n, n + some.images, scratch), n, store);
  }
}

void conv_nchw(const ConvArgs& a, const CsrPacked& w) {
  const auto store = kernel_for<conv_store>(active_isa()).fn;
  const int64_t plane = a.out_h * a.out_w, element = dtype_size(a.dtype);
  product_of_images(a, w,
                    [&](const OutputSpan* outputs, int32_t n, int64_t row0, int32_t rows, const float* acc,
                        int32_t acc_stride) {
                      ConvSpan spans[kMaxSpans];
                      for (int32_t i = 0; i < n; ++i)
                        spans[i] = {outputs[i].first, outputs[i].count,
                                    outputs[i].image * w.header->rows * plane + outputs[i].position};
                      store({acc, acc_stride, rows, spans, n, a.bias ? a.bias + row0 : nullptr, a.activation,
                             static_cast<char*>(a.y) + row0 * plane * element, plane, a.dtype, a.residual});
                    });
}

// 1x1 on pixels: tokens are pixels. `x` holds the pixels of the output, in order.
void conv_pixels(const ConvArgs& a, const CsrPacked& w, const void* x, int64_t pixel_stride, int64_t images,
                 void* y) {
  linear_csr({x, pixel_stride, images * a.out_h * a.out_w, a.dtype, a.bias, a.activation, y, w.header->rows,
              a.residual},
             w);
}

// Copies the pixels that a strided or padded 1x1 kernel reads, images [n0, n1), to [.., channels] contiguous.
void collect_pixels(const ConvArgs& a, int64_t n0, int64_t n1, char* to) {
  const int64_t element = dtype_size(a.dtype), bytes = a.channels * element;
  parallel_for(0, (n1 - n0) * a.out_h, std::max<int64_t>(1, (int64_t{1} << 16) / (a.out_w * bytes)),
               [&](int64_t r0, int64_t r1) {
                 for (int64_t r = r0; r < r1; ++r) {
                   const int64_t n = n0 + r / a.out_h, iy = r % a.out_h * a.stride_h - a.pad_top;
                   for (int64_t ox = 0; ox < a.out_w; ++ox) {
                     const int64_t ix = ox * a.stride_w - a.pad_left;
                     char* pixel = to + (r * a.out_w + ox) * bytes;
                     if (iy < 0 || iy >= a.height || ix < 0 || ix >= a.width) {
                       std::memset(pixel, 0, bytes);
                     } else {
                       const int64_t at = n * a.image_stride + (iy * a.width + ix) * a.pixel_stride;
                       std::memcpy(pixel, static_cast<const char*>(a.x) + at * element, bytes);
                     }
                   }
                 }
               });
}

// Images [n0, n1) as float32 planes [channels][pitch], pitch a multiple of 16.
void transpose_planes(const ConvArgs& a, int64_t n0, int64_t n1, int64_t pitch, float* to) {
  const auto pack = kernel_for<panel_pack>(active_isa()).fn;
  const int64_t element = dtype_size(a.dtype), pixels = a.height * a.width;
  constexpr int64_t kPixels = kPanelMaxGroups * kPanelGroup;
  const int64_t strips = (pixels + kPixels - 1) / kPixels;
  parallel_for(0, (n1 - n0) * strips, std::max<int64_t>(1, (int64_t{1} << 15) / (kPixels * a.channels)),
               [&](int64_t s0, int64_t s1) {
                 for (int64_t s = s0; s < s1; ++s) {
                   const int64_t n = s / strips, p = s % strips * kPixels;
                   const int32_t count = static_cast<int32_t>(std::min(kPixels, pixels - p));
                   for (int64_t c = 0; c < a.channels; c += kTransposeUnits)
                     pack({static_cast<const char*>(a.x) +
                               ((n0 + n) * a.image_stride + p * a.pixel_stride + c) * element,
                           a.pixel_stride, a.dtype, count, (count + kPanelGroup - 1) / kPanelGroup,
                           static_cast<int32_t>(std::min(kTransposeUnits, a.channels - c)),
                           static_cast<int32_t>(pitch), to + (n * a.channels + c) * pitch + p});
                 }
               });
}

void conv_nhwc(const ConvArgs& a, const CsrPacked& w) {
  const PackedHeader& h = *w.header;
  const int64_t element = dtype_size(a.dtype), out_pixels = a.out_h * a.out_w;
  const auto y_of = [&](int64_t n) { return static_cast<char*>(a.y) + n * out_pixels * h.rows * element; };
  const bool one_by_one = h.kh == 1 && h.kw == 1;
  if (one_by_one && a.stride_h == 1 && a.stride_w == 1 && a.out_h == a.height && a.out_w == a.width) {
    if (a.images == 1 || a.image_stride == out_pixels * a.pixel_stride)
      return conv_pixels(a, w, a.x, a.pixel_stride, a.images, a.y);
    for (int64_t n = 0; n < a.images; ++n)
      conv_pixels(a, w, static_cast<const char*>(a.x) + n * a.image_stride * element, a.pixel_stride, 1,
                  y_of(n));
    return;
  }
  thread_local Scratch memory;
  const int64_t pitch = static_cast<int64_t>(round_up(a.height * a.width, kPanelGroup));
  const int64_t image_floats = one_by_one ? (out_pixels * a.channels * element + 3) / 4 : a.channels * pitch;
  const int64_t step = std::min(a.images, std::max<int64_t>(1, kPlaneFloats / image_floats));
  float* scratch = memory.get<float>(step * image_floats);
  const auto store = kernel_for<panel_store>(active_isa()).fn;
  for (int64_t n0 = 0; n0 < a.images; n0 += step) {
    const int64_t n1 = std::min(a.images, n0 + step);
    if (one_by_one) {
      collect_pixels(a, n0, n1, reinterpret_cast<char*>(scratch));
      conv_pixels(a, w, scratch, a.channels, n1 - n0, y_of(n0));
      continue;
    }
    transpose_planes(a, n0, n1, pitch, scratch);
    ConvArgs planes = a;
    planes.x = scratch;
    planes.dtype = DType::f32;
    planes.images = n1 - n0;
    planes.image_stride = a.channels * pitch;
    planes.channel_stride = pitch;
    product_of_images(planes, w,
                      [&](const OutputSpan* spans, int32_t n, int64_t row0, int32_t rows, const float* acc,
                          int32_t acc_stride) {
                        for (const OutputSpan* s = spans; s != spans + n; ++s)
                          store({acc + s->first, acc_stride, rows, s->count, a.bias ? a.bias + row0 : nullptr,
                                 a.activation, y_of(n0 + s->image) + (s->position * h.rows + row0) * element,
                                 h.rows, a.dtype, a.residual});
                      });
  }
}

}  // namespace

void conv2d_csr(const ConvArgs& args, const CsrPacked& w) {
  if (args.images == 0 || w.header->rows == 0) return;
  if (args.layout == ImageLayout::nchw) conv_nchw(args, w);
  else conv_nhwc(args, w);
}

}  // namespace pared
