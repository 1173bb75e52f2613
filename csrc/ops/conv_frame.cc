#include "ops/conv_frame.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/generic/half.h"
#include "kernels/registry.h"

namespace pared {
namespace {

constexpr int64_t kStripWords = 16 * 1024;  // of planes that are transposed to pixels: they stay in L2
constexpr int64_t kFewChannels = 32;        // of a pixel: less than two vectors
constexpr int64_t kPlaneBlock = 4;          // units that are quantised together: 16 channels
constexpr int64_t kManyBlocks = 4;
constexpr int64_t kGrain = 1 << 15;             // elements that are worth a task
constexpr uint32_t kInfinityBits = 0x7f800000;  // and above: not finite

void raise_to(std::atomic<uint32_t>& most, uint32_t bits) {
  uint32_t seen = most.load(std::memory_order_relaxed);
  while (seen < bits && !most.compare_exchange_weak(seen, bits, std::memory_order_relaxed)) {
  }
}

}  // namespace

ConvImage::ConvImage(const ConvArgs& a, const PackedHeader& h)
    : a_(a),
      kw_(h.kw),
      groups_(h.groups),
      channels_(h.channels),
      group_words_(int8_words(h).per_tap()),
      rows_((a.out_h - 1) + (h.kh - 1) * a.dilation_h / a.stride_h + 1),
      read_rows_(a.stride_h) {
  for (int64_t i = 0; i < h.kh; ++i) read_rows_[i * a.dilation_h % a.stride_h] = true;
}

ConvFrame::ConvFrame(const ConvArgs& a, const PackedHeader& h)
    : ConvImage(a, h),
      row_units_(int8_words(h).per_row()),
      pitch_(static_cast<int64_t>(
          round_up((a.out_w - 1) * a.stride_w + (h.kw - 1) * a.dilation_w + 1, a.stride_w))) {
  const int64_t words = group_words_ * groups_;
  // As for tokens: 16 neighbours, which are read together, lie in different sets of the cache.
  pixel_words_ =
      words <= kPanelGroup ? words : static_cast<int64_t>(round_up(words, kPanelGroup)) | kPanelGroup;
  taps_touch_ = a.dilation_w == 1 && pixel_words_ == group_words_;
}

int64_t ConvFrame::unit(int64_t u, int64_t* run) const {
  const int64_t group = u / row_units_, tap = u % row_units_ / group_words_, c = u % group_words_;
  const int64_t p = tap / kw_ * a_.dilation_h;
  *run = (taps_touch_ ? (kw_ - tap % kw_) * group_words_ : group_words_) - c;
  return ((p % a_.stride_h * rows_ + p / a_.stride_h) * pitch_ + tap % kw_ * a_.dilation_w) * pixel_words_ +
         group * group_words_ + c;
}

float ConvImage::scale_of(const char* image) const {
  const auto largest = kernel_for<largest_magnitude>(active_isa()).fn;
  const int64_t element = dtype_size(a_.dtype), pixels = a_.height * a_.width;
  const bool nchw = a_.layout == ImageLayout::nchw;
  const int64_t step = nchw ? a_.channel_stride : a_.pixel_stride;
  int64_t runs = nchw ? a_.channels : pixels, length = nchw ? pixels : a_.channels;
  if (step == length) {  // one run, cut so that threads share it
    length *= runs;
    runs = (length + kGrain - 1) / kGrain;
    std::atomic<uint32_t> most{0};
    parallel_for(0, runs, 4, [&](int64_t i0, int64_t i1) {
      uint32_t bits;
      const int64_t begin = i0 * kGrain, end = std::min(length, i1 * kGrain);
      largest({image + begin * element, a_.dtype, end - begin, &bits});
      raise_to(most, bits);
    });
    return most.load() >= kInfinityBits ? std::nanf("") : bits_float(most.load());
  }
  std::atomic<uint32_t> most{0};
  parallel_for(0, runs, std::max<int64_t>(1, 4 * kGrain / length), [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      uint32_t bits;
      largest({image + i * step * element, a_.dtype, length, &bits});
      raise_to(most, bits);
    }
  });
  return most.load() >= kInfinityBits ? std::nanf("") : bits_float(most.load());
}

float ConvImage::quantize(int64_t n, const ActivationRange& range, uint32_t* words) const {
  const char* image = static_cast<const char*>(a_.x) + n * a_.image_stride * dtype_size(a_.dtype);
  float scale = range.scale;
  if (scale == 0.0f) {
    const float largest = scale_of(image);
    // Neither is multiplied: the kernels' sums only have to be something.
    if (!(largest >= kSmallestMax)) {
      std::memset(words, range.zero, this->words() * sizeof(uint32_t));
      return std::isnan(largest) ? largest : 0.0f;
    }
    scale = largest / 127.0f;
  }
  const uint32_t most = write(image, scale, range, words);
  return most >= kInfinityBits ? std::nanf("") : scale;
}

uint32_t ConvFrame::write(const char* image, float scale, const ActivationRange& range,
                          uint32_t* frame) const {
  auto* bytes = reinterpret_cast<uint8_t*>(frame);
  const auto rows = kernel_for<quantize_u8>(active_isa()).fn;
  const auto planes = kernel_for<quantize_planes>(active_isa()).fn;
  const auto transpose = kernel_for<panel_pack>(active_isa()).fn;
  const int64_t element = dtype_size(a_.dtype), pixel_bytes = pixel_words_ * kInt8Unit;
  const int64_t words = group_words_ * groups_;
  // Neighbouring rows without padding between them are one long row.
  const bool flat =
      a_.stride_h == 1 && a_.pad_top == 0 && a_.pad_left == 0 && rows_ <= a_.height && pitch_ == a_.width;
  const int64_t width = flat ? rows_ * a_.width : a_.width, pitch = flat ? width : pitch_;
  const int64_t frame_rows = flat ? 1 : rows_ * a_.stride_h;
  const int64_t columns = std::max<int64_t>(0, std::min(width, pitch - a_.pad_left));
  const int64_t left = std::min(a_.pad_left, pitch), right = pitch - left - columns;
  const int64_t strip =
      std::clamp<int64_t>(kStripWords / words / kPanelGroup * kPanelGroup, kPanelGroup, 128);
  std::atomic<uint32_t> most{0};

  // Pixels [x0, x0 + count) of row y to `to`.
  const auto pixels = [&](int64_t y, int64_t x0, int64_t count, uint8_t* to) {
    uint32_t bits = 0;
    if (a_.layout == ImageLayout::nhwc) {
      const char* x = image + (y * a_.width + x0) * a_.pixel_stride * element;
      const auto quantise = [&](const void* from, int64_t stride, int64_t some, int64_t length, uint8_t* out,
                                int64_t out_stride) {
        thread_local Scratch memory;
        float* scales = memory.get<float>(some);
        rows({from, stride, a_.dtype, static_cast<int32_t>(some), static_cast<int32_t>(length), scale,
              range.zero, range.low, range.high, out, out_stride, scales});
        for (int64_t i = 0; i < some; ++i)
          if (std::isnan(scales[i])) bits = kInfinityBits;
      };
      const int64_t elements = count * channels_;
      if (groups_ == 1 && a_.pixel_stride == channels_ && channels_ < kFewChannels) {
        // A pixel is less than a vector: quantised as one row, and spread where it does not fill its words.
        const bool fills = channels_ == pixel_words_ * kInt8Unit;
        thread_local Scratch memory;
        auto* flat = fills ? to : memory.get<uint8_t>(round_up(elements, kInt8Unit));
        quantise(x, elements, 1, elements, flat, 0);
        for (int64_t i = 0; i < (fills ? 0 : count); ++i) {
          std::memset(to + i * pixel_bytes, 0, pixel_bytes);
          std::memcpy(to + i * pixel_bytes, flat + i * channels_, channels_);
        }
        return bits;
      }
      for (int64_t g = 0; g < groups_; ++g)
        quantise(x + g * channels_ * element, a_.pixel_stride, count, channels_,
                 to + g * group_words_ * kInt8Unit, pixel_bytes);
      return bits;
    }
    thread_local Scratch memory;
    auto* units = memory.get<uint32_t>(words * strip);
    const int64_t at = y * a_.width + x0;
    for (int64_t g = 0; g < groups_; ++g) {
      uint32_t largest;
      planes({image + (g * channels_ * a_.channel_stride + at) * element, a_.channel_stride, a_.dtype,
              static_cast<int32_t>(channels_), static_cast<int32_t>(count), a_.height * a_.width - at, scale,
              range.zero, range.low, range.high, units + g * group_words_ * strip, strip, &largest});
      bits = std::max(bits, largest);
    }
    auto* pixel = reinterpret_cast<uint32_t*>(to);
    if (pixel_words_ == 1) {
      std::memcpy(pixel, units, count * sizeof(uint32_t));
    } else if (words < kPanelGroup) {
      for (int64_t u = 0; u < words; ++u)
        for (int64_t i = 0; i < count; ++i) pixel[i * pixel_words_ + u] = units[u * strip + i];
    } else {
      // Whole vectors: pixel_words_ has room for them.
      constexpr int64_t kWords = kPanelMaxGroups * kPanelGroup;
      for (int64_t u = 0; u < words; u += kWords) {
        const auto some = static_cast<int32_t>(std::min(kWords, words - u));
        transpose({units + u * strip, strip, DType::f32, some, (some + kPanelGroup - 1) / kPanelGroup,
                   static_cast<int32_t>(count), static_cast<int32_t>(pixel_words_),
                   reinterpret_cast<float*>(pixel + u)});
      }
    }
    return bits;
  };

  // Tasks are strips where there is one row, else rows.
  const int64_t strips = flat ? (columns + strip - 1) / strip : 1;
  const int64_t task = std::max<int64_t>(1, (flat ? strip : a_.width) * a_.channels);
  parallel_for(0, frame_rows * strips, std::max<int64_t>(1, kGrain / task), [&](int64_t t0, int64_t t1) {
    uint32_t bits = 0;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t p = t / strips;  // row of the padded image
      if (!read_rows_[p % a_.stride_h]) continue;
      uint8_t* row = bytes + (p % a_.stride_h * rows_ + p / a_.stride_h) * pitch * pixel_bytes;
      if (flat) {
        const int64_t x = t % strips * strip;
        bits = std::max(bits, pixels(0, x, std::min(strip, columns - x), row + x * pixel_bytes));
        continue;
      }
      const int64_t y = p - a_.pad_top;
      if (y < 0 || y >= a_.height) {
        std::memset(row, range.zero, pitch * pixel_bytes);
        continue;
      }
      std::memset(row, range.zero, left * pixel_bytes);
      for (int64_t x = 0; x < columns; x += strip)
        bits = std::max(bits, pixels(y, x, std::min(strip, columns - x), row + (left + x) * pixel_bytes));
      std::memset(row + (left + columns) * pixel_bytes, range.zero, right * pixel_bytes);
    }
    raise_to(most, bits);
  });
  return most.load();
}

ConvPlanes::ConvPlanes(const ConvArgs& a, const PackedHeader& h)
    : ConvImage(a, h),
      pitch_((a.out_w - 1) + (h.kw - 1) * a.dilation_w / a.stride_w + 1),
      // Whole vectors are read and written: room for one behind the last.
      part_(static_cast<int64_t>(round_up(rows_ * pitch_, kPanelGroup)) + kPanelGroup),
      read_columns_(a.stride_w) {
  // An odd number of cache lines, lest the planes of a power of two fall into one set.
  constexpr int64_t kLine = kCacheLine / sizeof(uint32_t);
  plane_ = (a.stride_h * a.stride_w * part_ / kLine | 1) * kLine;
  for (int64_t i = 0; i < h.kh; ++i)
    for (int64_t j = 0; j < kw_; ++j) {
      const int64_t y = i * a.dilation_h, x = j * a.dilation_w;
      read_columns_[x % a.stride_w] = true;
      taps_at_.push_back((y % a.stride_h * a.stride_w + x % a.stride_w) * part_ + y / a.stride_h * pitch_ +
                         x / a.stride_w);
    }
}

int64_t ConvPlanes::words_read(int64_t outputs) const {
  int64_t words = 0;
  for (int64_t part = 0; part < a_.stride_h * a_.stride_w; ++part) {
    int64_t end = 0;
    for (int64_t at : taps_at_) {  // ascending within a part
      if (at / part_ != part) continue;
      words += at + outputs - std::max(at, end);
      end = at + outputs;
    }
  }
  return words;
}

uint32_t ConvPlanes::write(const char* image, float scale, const ActivationRange& range,
                           uint32_t* words) const {
  const Isa isa = active_isa();
  const auto quantise = kernel_for<quantize_planes>(isa).fn;
  const auto split = kernel_for<conv_split>(isa).fn;
  const int64_t element = dtype_size(a_.dtype), width = a_.width, pixels = a_.height * width;
  const int64_t sw = a_.stride_w, sh = a_.stride_h, padded = pitch_ * sw;
  const int64_t left = std::min(a_.pad_left, padded), columns = std::min(width, padded - left);
  const int64_t row_words = std::max(padded, left + static_cast<int64_t>(round_up(columns, kPanelGroup)));
  const uint32_t zeros = 0x01010101u * static_cast<uint32_t>(range.zero);
  const bool flat =
      sh == 1 && sw == 1 && a_.pad_top == 0 && left == 0 && rows_ <= a_.height && pitch_ == width;
  const int64_t blocks = (group_words_ + kPlaneBlock - 1) / kPlaneBlock, rows = rows_ * sh;
  // Threads share the blocks of channels, and rows where there are few of those.
  const int64_t shares = flat || groups_ * blocks >= kManyBlocks ? 1 : std::min<int64_t>(rows, num_threads());
  const int64_t task = std::max<int64_t>(1, rows * width / shares * std::min(channels_, 4 * kPlaneBlock));
  std::atomic<uint32_t> most{0};
  parallel_for(0, groups_ * blocks * shares, std::max<int64_t>(1, kGrain / task),
               [&](int64_t t0, int64_t t1) {
                 thread_local Scratch row_memory, last_memory;
                 auto* row = row_memory.get<uint32_t>(kPlaneBlock * row_words);
                 auto* last = last_memory.get<uint32_t>(kPlaneBlock * round_up(pitch_, kPanelGroup));
                 const auto last_stride = static_cast<int64_t>(round_up(pitch_, kPanelGroup));
                 uint32_t bits = 0;
                 for (int64_t t = t0; t < t1; ++t) {
                   const int64_t g = t / shares / blocks, b = t / shares % blocks, share = t % shares;
                   const int64_t u0 = group_words_ * b / blocks, units = group_words_ * (b + 1) / blocks - u0;
                   const int64_t c0 = u0 * kInt8Unit, channels = std::min(channels_ - c0, units * kInt8Unit);
                   const char* x = image + (g * channels_ + c0) * a_.channel_stride * element;
                   uint32_t* planes = words + (g * group_words_ + u0) * plane_;
                   const auto bytes = [&](int64_t at, int64_t count, uint32_t* to, int64_t stride) {
                     uint32_t largest;
                     quantise({x + at * element, a_.channel_stride, a_.dtype, static_cast<int32_t>(channels),
                               static_cast<int32_t>(count), pixels - at, scale, range.zero, range.low,
                               range.high, to, stride, &largest});
                     bits = std::max(bits, largest);
                   };
                   if (flat) {
                     bytes(0, rows_ * width, planes, plane_);
                     continue;
                   }
                   for (int64_t u = 0; u < units; ++u) std::fill_n(row + u * row_words, left, zeros);
                   const int64_t begin = rows * share / shares, end = rows * (share + 1) / shares;
                   for (int64_t p = begin; p < end; ++p) {
                     if (!read_rows_[p % sh]) continue;
                     const int64_t y = p - a_.pad_top;
                     const bool inside = y >= 0 && y < a_.height;
                     if (inside && columns > 0) bytes(y * width, columns, row + left, row_words);
                     for (int64_t u = 0; u < units; ++u)
                       std::fill(row + u * row_words + (inside ? left + columns : 0),
                                 row + u * row_words + padded, zeros);
                     for (int64_t q = 0; q < sw; ++q) {
                       if (!read_columns_[q]) continue;
                       uint32_t* to = planes + (p % sh * sw + q) * part_ + p / sh * pitch_;
                       // Vectors reach into the next row, which another thread may have written.
                       const bool apart = end < rows && p + sh >= end;
                       split({row + q, DType::f32, sw, row_words, apart ? last_stride : plane_, units, pitch_,
                              0, reinterpret_cast<float*>(apart ? last : to)});
                       for (int64_t u = 0; u < (apart ? units : 0); ++u)
                         std::copy_n(last + u * last_stride, pitch_, to + u * plane_);
                     }
                   }
                 }
                 raise_to(most, bits);
               });
  return most.load();
}

}  // namespace pared
