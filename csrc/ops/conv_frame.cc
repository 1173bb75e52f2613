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

constexpr int64_t kStripWords = 16 * 1024;      // of planes that are transposed to pixels: they stay in L2
constexpr int64_t kFewChannels = 32;            // of a pixel: less than two vectors
constexpr int64_t kGrain = 1 << 15;             // elements that are worth a task
constexpr uint32_t kInfinityBits = 0x7f800000;  // and above: not finite

void raise_to(std::atomic<uint32_t>& most, uint32_t bits) {
  uint32_t seen = most.load(std::memory_order_relaxed);
  while (seen < bits && !most.compare_exchange_weak(seen, bits, std::memory_order_relaxed)) {
  }
}

}  // namespace

ConvFrame::ConvFrame(const ConvArgs& a, const PackedHeader& h)
    : a_(a),
      kw_(h.kw),
      groups_(h.groups),
      channels_(h.channels),
      group_words_(int8_words(h).per_tap()),
      row_units_(int8_words(h).per_row()),
      rows_((a.out_h - 1) + (h.kh - 1) * a.dilation_h / a.stride_h + 1),
      pitch_(static_cast<int64_t>(
          round_up((a.out_w - 1) * a.stride_w + (h.kw - 1) * a.dilation_w + 1, a.stride_w))) {
  const int64_t words = group_words_ * groups_;
  // As for tokens: 16 neighbours, which are read together, lie in different sets of the cache.
  pixel_words_ =
      words <= kPanelGroup ? words : static_cast<int64_t>(round_up(words, kPanelGroup)) | kPanelGroup;
  taps_touch_ = a.dilation_w == 1 && pixel_words_ == group_words_;
  read_rows_.assign(a.stride_h, false);
  for (int64_t i = 0; i < h.kh; ++i) read_rows_[i * a.dilation_h % a.stride_h] = true;
}

int64_t ConvFrame::unit(int64_t u, int64_t* run) const {
  const int64_t group = u / row_units_, tap = u % row_units_ / group_words_, c = u % group_words_;
  const int64_t p = tap / kw_ * a_.dilation_h;
  *run = (taps_touch_ ? (kw_ - tap % kw_) * group_words_ : group_words_) - c;
  return ((p % a_.stride_h * rows_ + p / a_.stride_h) * pitch_ + tap % kw_ * a_.dilation_w) * pixel_words_ +
         group * group_words_ + c;
}

float ConvFrame::scale_of(const char* image) const {
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

float ConvFrame::quantize(int64_t n, const ActivationRange& range, uint32_t* words) const {
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
  const uint32_t most = quantize_rows(image, scale, range, reinterpret_cast<uint8_t*>(words));
  return most >= kInfinityBits ? std::nanf("") : scale;
}

// Writes the frame row by row; the largest magnitude that was read, as bits.
uint32_t ConvFrame::quantize_rows(const char* image, float scale, const ActivationRange& range,
                                  uint8_t* bytes) const {
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

}  // namespace pared
