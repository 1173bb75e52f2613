// An image becomes bytes, pixel by pixel with a group's channels padded to words, in a frame that holds the
// padding: what a kernel tap reads is then, for neighbouring outputs, words at one distance. With an output
// row as long as the frame's (columns too many are not stored), that holds for a whole tile, so that the
// packer of the linear operation packs a tap's channels in one call. A vertical stride is taken out by
// sorting the frame's rows by their remainder.
#include "ops/conv_bsr8.h"

#include <cmath>
#include <cstring>

#include "kernels/generic/half.h"
#include "ops/panel_product.h"

namespace pared {
namespace {

constexpr int32_t kZeroPoint = 128;
constexpr int64_t kStripFloats = 16 * 1024;  // of an NCHW image that is transposed before it is quantised

// Where the bytes of an image lie.
class Frame {
 public:
  Frame(const ConvArgs& a, const PackedHeader& h)
      : a_(a),
        kw_(h.kw),
        group_words_((h.channels + kInt8Unit - 1) / kInt8Unit),
        row_units_(group_words_ * h.kh * h.kw),
        rows_((a.out_h - 1) + (h.kh - 1) * a.dilation_h / a.stride_h + 1),
        pitch_(static_cast<int64_t>(
            round_up((a.out_w - 1) * a.stride_w + (h.kw - 1) * a.dilation_w + 1, a.stride_w))) {
    const int64_t words = group_words_ * h.groups;
    // As for tokens: 16 neighbours, which are read together, lie in different sets of the cache.
    pixel_words_ =
        words <= kPanelGroup ? words : static_cast<int64_t>(round_up(words, kPanelGroup)) | kPanelGroup;
  }

  int64_t words() const { return a_.stride_h * rows_ * pitch_ * pixel_words_; }
  int64_t pixel_words() const { return pixel_words_; }
  int64_t group_words() const { return group_words_; }
  // Word of row y of the image, pixel 0; -1 for a row that no tap reads. Columns [x0, x1) of it are in the
  // frame.
  int64_t row(int64_t y) const {
    const int64_t p = y + a_.pad_top, r = p / a_.stride_h;
    return r < rows_ ? ((p % a_.stride_h * rows_ + r) * pitch_ + a_.pad_left) * pixel_words_ : -1;
  }
  int64_t columns() const { return std::min(a_.width, pitch_ - a_.pad_left); }

  // Outputs are numbered with this many a row, of which out_w are real.
  int64_t outputs_a_row() const { return pitch_ / a_.stride_w; }
  int64_t positions() const { return (a_.out_h - 1) * outputs_a_row() + a_.out_w; }
  int64_t position_words() const { return a_.stride_w * pixel_words_; }
  // Word that output 0 reads for a unit of the reduction, and how many units follow it in the same pixel.
  int64_t unit(int64_t u, int64_t* run) const {
    const int64_t group = u / row_units_, tap = u % row_units_ / group_words_, c = u % group_words_;
    const int64_t p = tap / kw_ * a_.dilation_h;
    *run = group_words_ - c;
    return ((p % a_.stride_h * rows_ + p / a_.stride_h) * pitch_ + tap % kw_ * a_.dilation_w) * pixel_words_ +
           group * group_words_ + c;
  }

 private:
  const ConvArgs& a_;
  int64_t kw_, group_words_, row_units_, rows_, pitch_, pixel_words_;
};

// The largest magnitude of `count` elements; NaN and infinity order above all others.
float largest_magnitude(const void* x, int64_t count, DType dtype) {
  if (dtype == DType::f32) {
    const auto* bits = static_cast<const int32_t*>(x);
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, bits[i] & 0x7fffffff);
    return bits_float(static_cast<uint32_t>(most));
  }
  const auto* bits = static_cast<const int16_t*>(x);
  int16_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max<int16_t>(most, bits[i] & 0x7fff);
  const auto half = static_cast<uint16_t>(most);
  return dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

// The scale of image n: NaN for one that is not finite, 0 for one that counts as zero.
float image_scale(const ConvArgs& a, const char* image) {
  const int64_t element = dtype_size(a.dtype), pixels = a.height * a.width;
  const bool nchw = a.layout == ImageLayout::nchw;
  const int64_t runs = nchw ? a.channels : pixels, length = nchw ? pixels : a.channels;
  const int64_t step = nchw ? a.channel_stride : a.pixel_stride;
  float most = 0.0f;
  for (int64_t i = 0; i < runs; ++i) {
    const float m = largest_magnitude(image + i * step * element, length, a.dtype);
    if (!std::isfinite(m)) return std::nanf("");
    most = std::max(most, m);
  }
  return most >= kSmallestMax ? most / 127.0f : 0.0f;
}

// Writes an image's bytes into the frame.
void quantize_image(const ConvArgs& a, const Frame& frame, const PackedHeader& h, const char* image,
                    float scale, uint8_t* bytes) {
  std::memset(bytes, kZeroPoint, frame.words() * kInt8Unit);
  if (!(scale > 0.0f)) return;
  const auto quantize = kernel_for<quantize_u8>(active_isa()).fn;
  const auto pack = kernel_for<panel_pack>(active_isa()).fn;
  const int64_t element = dtype_size(a.dtype), columns = frame.columns();
  const int64_t padded = static_cast<int64_t>(round_up(a.channels, kPanelGroup));
  const int64_t strip = std::clamp<int64_t>(kStripFloats / padded, 4, 128);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(1, a.width * a.channels));
  parallel_for(0, a.height, grain, [&](int64_t y0, int64_t y1) {
    thread_local Scratch strip_memory, scales_memory;
    float* scales = scales_memory.get<float>(a.width);
    float* pixels = strip_memory.get<float>(strip * padded);
    const auto quantize_pixels = [&](const void* x, int64_t stride, DType dtype, int64_t count,
                                     int64_t word) {
      for (int64_t g = 0; g < h.groups; ++g)
        quantize({static_cast<const char*>(x) + g * h.channels * dtype_size(dtype), stride, dtype,
                  static_cast<int32_t>(count), h.channels, scale, kZeroPoint, 1, 255,
                  bytes + (word + g * frame.group_words()) * kInt8Unit, frame.pixel_words() * kInt8Unit,
                  scales});
    };
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t word = frame.row(y);
      if (word < 0) continue;
      if (a.layout == ImageLayout::nhwc) {
        quantize_pixels(image + y * a.width * a.pixel_stride * element, a.pixel_stride, a.dtype, columns,
                        word);
        continue;
      }
      constexpr int64_t kChannels = kPanelMaxGroups * kPanelGroup;
      for (int64_t x = 0; x < columns; x += strip) {
        const int64_t count = std::min(strip, columns - x);
        for (int64_t c = 0; c < a.channels; c += kChannels) {
          const int32_t some = static_cast<int32_t>(std::min(kChannels, a.channels - c));
          pack({image + (c * a.channel_stride + y * a.width + x) * element, a.channel_stride, a.dtype, some,
                (some + kPanelGroup - 1) / kPanelGroup, static_cast<int32_t>(count),
                static_cast<int32_t>(padded), pixels + c});
        }
        quantize_pixels(pixels, padded, DType::f32, count, word + x * frame.pixel_words());
      }
    }
  });
}

}  // namespace

void conv2d_bsr8(const ConvArgs& a, const Bsr8Packed& w) {
  const PackedHeader& h = *w.panel.header;
  if (a.images == 0 || h.rows == 0) return;
  const Isa isa = active_isa();
  const auto pack = kernel_for<panel_pack>(isa).fn;
  const auto dequantize = kernel_for<panel_dequantize>(isa).fn;
  const auto store_planes = kernel_for<conv_store>(isa).fn;
  const auto store_pixels = kernel_for<panel_store>(isa).fn;
  const Frame frame(a, h);
  const int64_t element = dtype_size(a.dtype), plane = a.out_h * a.out_w, a_row = frame.outputs_a_row();
  thread_local Scratch memory;
  uint32_t* words = memory.get<uint32_t>(frame.words());
  for (int64_t n = 0; n < a.images; ++n) {
    const char* image = static_cast<const char*>(a.x) + n * a.image_stride * element;
    char* y = static_cast<char*>(a.y) + n * plane * h.rows * element;
    const float scale = image_scale(a, image);
    quantize_image(a, frame, h, image, scale, reinterpret_cast<uint8_t*>(words));
    alignas(kCacheLine) float scales[kPanelMaxGroups * kPanelGroup];
    std::fill(std::begin(scales), std::end(scales), scale);
    panel_product(
        w.panel, word_kernels(h), frame.positions(), [](const PanelTile&) {},
        [&](const PanelTile& t, int64_t k0, int32_t units, int32_t stride, int32_t* panel) -> const int32_t* {
          for (int64_t u = k0, run; u < k0 + units; u += run) {
            const uint32_t* from = words + frame.unit(u, &run) + t.first * frame.position_words();
            run = std::min(run, k0 + units - u);
            pack({from, frame.position_words(), DType::f32, t.positions, t.vectors, static_cast<int32_t>(run),
                  stride, reinterpret_cast<float*>(panel + (u - k0) * stride)});
          }
          return panel;
        },
        [&](const PanelTile& t, int64_t row0, int32_t rows, int32_t* acc, int32_t acc_stride) {
          dequantize({acc, acc_stride, rows, t.vectors * kPanelGroup, kZeroPoint, w.sums + row0,
                      w.scales + row0, scales});
          const auto* sums = reinterpret_cast<const float*>(acc);
          const float* bias = a.bias ? a.bias + row0 : nullptr;
          ConvSpan spans[kPanelMaxGroups * kPanelGroup];
          int32_t count = 0;
          for (int64_t m = t.first; m < t.first + t.positions;) {
            const int64_t oy = m / a_row, ox = m % a_row;
            const int64_t end = std::min(t.first + t.positions, (oy + 1) * a_row);
            const int32_t real = static_cast<int32_t>(std::min(a.out_w - ox, end - m));
            if (real > 0) spans[count++] = {static_cast<int32_t>(m - t.first), real, oy * a.out_w + ox};
            m = end;
          }
          if (a.layout == ImageLayout::nchw)
            return store_planes({sums, acc_stride, rows, spans, count, bias, a.activation,
                                 y + row0 * plane * element, plane, a.dtype});
          for (int32_t i = 0; i < count; ++i)
            store_pixels({sums + spans[i].first, acc_stride, rows, spans[i].count, bias, a.activation,
                          y + (spans[i].offset * h.rows + row0) * element, h.rows, a.dtype});
        });
  }
}

}  // namespace pared
