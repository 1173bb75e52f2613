#include "ref/random_cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/aligned.h"
#include "core/check.h"
#include "formats/bitmap8.h"
#include "formats/int4.h"
#include "formats/pair.h"
#include "formats/values.h"
#include "ops/attention.h"
#include "ops/bitmap.h"
#include "ops/bitmap8.h"
#include "ops/conv.h"
#include "ops/conv_bsr8.h"
#include "ops/conv_int8.h"
#include "ops/linear.h"
#include "ops/linear_chain.h"
#include "ops/linear_int4.h"
#include "ops/linear_int8.h"
#include "ops/topk.h"
#include "ref/attention.h"

namespace pared {
namespace {

// splitmix64: a case is its seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int range(int low, int high) {  // both included
    return low + static_cast<int>((bits() >> 32) * static_cast<uint64_t>(high - low + 1) >> 32);
  }
  bool one_in(int n) { return range(1, n) == 1; }
  // Mostly small, sometimes around a tile of `tile`, seldom several of them.
  int size(int small, int tile) {
    const int kind = range(0, 63);
    if (kind < 56) return range(0, small);
    return kind < 63 ? range(std::max(0, tile - 1), tile + 1) : range(0, 3 * tile);
  }

 private:
  uint64_t state_;
};

// What one case compares; the first difference is kept.
struct Outcome {
  bool wrong = false;
  std::string what;
  void differ(int64_t at, double got, double want) {
    if (!wrong) what = str("element ", at, ": expected ", want, ", got ", got);
    wrong = true;
  }
};

// Memory that cases reuse; `get` as Scratch has it.
struct Memory {
  Memory() {
    // Nothing has an address too, as arrays of numpy do.
    for (auto* v : {&w, &x, &y, &bias, &scales}) v->reserve(1);
    q.reserve(1);
  }
  Scratch packed, dense;
  std::vector<float> w, x, y, bias, scales;
  std::vector<int8_t> q;
};

template <class T>
void fault_in(Random& r, std::vector<T>& values, bool fault) {
  if (fault && !values.empty()) {
    T& v = values[r.range(0, static_cast<int>(values.size()) - 1)];
    v = static_cast<T>(v == 0 ? 3 : 0);
  }
}

// ---- linear

struct Shape {
  int tokens, rows, cols, x_gap;
};

Shape linear_shape(Random& r) {
  return {r.one_in(24) ? r.size(40, 128) : r.range(0, 9), r.size(20, 33), r.size(24, 128),
          r.one_in(4) ? 5 : 0};
}

// Integers: weights up to `most`, `density` in sixteenths; inputs up to `most_x`, each token's largest
// exactly that, which makes the scale of a dynamic quantisation to 127 steps a power of two.
void fill_linear(Random& r, const Shape& s, int most, int most_x, Memory& m) {
  const int density = r.range(0, 16);
  m.w.assign(static_cast<size_t>(s.rows) * s.cols, 0.0f);
  for (float& v : m.w)
    if (density == 16 || r.range(0, 15) < density) v = static_cast<float>(r.range(-most, most));
  m.x.assign(static_cast<size_t>(s.tokens) * (s.cols + s.x_gap), -1.0f);
  for (int t = 0; t < s.tokens; ++t) {
    float* x = m.x.data() + static_cast<int64_t>(t) * (s.cols + s.x_gap);
    for (int k = 0; k < s.cols; ++k) x[k] = static_cast<float>(r.range(-most_x, most_x));
    if (s.cols > 0) x[r.range(0, s.cols - 1)] = static_cast<float>(r.one_in(2) ? most_x : -most_x);
  }
  m.bias.assign(r.one_in(2) ? s.rows : 0, 0.0f);
  for (float& b : m.bias) b = static_cast<float>(r.range(-9, 9));
  m.y.assign(static_cast<size_t>(s.tokens) * s.rows, -77.0f);
}

LinearArgs linear_args(const Shape& s, Memory& m, bool relu) {
  return {m.x.data(),
          s.cols + s.x_gap,
          s.tokens,
          DType::f32,
          m.bias.empty() ? nullptr : m.bias.data(),
          relu ? Activation::relu : Activation::none,
          m.y.data(),
          s.rows};
}

// y = relu?(sum of w x * row scale + bias), w and scale the reference's own.
void check_linear(const Shape& s, const Memory& m, const std::vector<float>& w, const float* row_scale,
                  bool relu, Outcome& out) {
  for (int t = 0; t < s.tokens; ++t)
    for (int n = 0; n < s.rows; ++n) {
      int64_t sum = 0;
      const float* x = m.x.data() + static_cast<int64_t>(t) * (s.cols + s.x_gap);
      for (int k = 0; k < s.cols; ++k)
        sum += static_cast<int64_t>(w[static_cast<int64_t>(n) * s.cols + k]) * static_cast<int64_t>(x[k]);
      double want = static_cast<double>(sum) * (row_scale ? row_scale[n] : 1.0f);
      if (!m.bias.empty()) want += m.bias[n];
      if (relu) want = std::max(want, 0.0);
      const int64_t at = static_cast<int64_t>(t) * s.rows + n;
      if (m.y[at] != want) out.differ(at, m.y[at], want);
    }
}

DenseView view_of(const Shape& s, const Memory& m) {
  return {m.w.data(), DType::f32, s.rows, s.cols, s.cols, 1};
}

// A float32 format: run(view, arguments, memory).
template <class Run>
void linear_float(Random& r, bool fault, Memory& m, Outcome& out, const Run& run) {
  const Shape s = linear_shape(r);
  const bool relu = r.one_in(4);
  fill_linear(r, s, 9, 9, m);
  run(view_of(s, m), linear_args(s, m, relu), m);
  fault_in(r, m.w, fault);
  check_linear(s, m, m.w, nullptr, relu, out);
}

void run_panel(PackedKind kind, int entry_rows, const DenseView& w, const LinearArgs& a, Memory& m) {
  const PanelPlan plan = plan_csr(w, {}, kind, entry_rows);
  auto* bytes = m.packed.get<uint8_t>(plan.header.bytes);
  pack_csr(w, plan, bytes);
  linear_csr(a, view_csr(bytes, static_cast<int64_t>(plan.header.bytes)));
}

// Two layers in one call, of any of the panel's kinds.
void chain(Random& r, bool fault, Memory& m, Outcome& out) {
  Shape s = linear_shape(r);
  s.cols = std::max(s.cols, 1);
  const bool relu = r.one_in(2);
  fill_linear(r, s, 5, 9, m);
  const int last_rows = r.size(20, 33);
  std::vector<float> w(static_cast<size_t>(last_rows) * s.rows + 1);
  for (float& v : w) v = static_cast<float>(r.range(-3, 3));
  const auto packed = [&](const float* values, int rows, int cols, Scratch& memory) {
    const DenseView view{values, DType::f32, rows, cols, cols, 1};
    const PanelPlan plan =
        r.one_in(2) ? plan_csr(view, {}, PackedKind::csr, 1) : plan_csr(view, {}, PackedKind::bsr, kQuadRows);
    auto* bytes = memory.get<uint8_t>(plan.header.bytes);
    pack_csr(view, plan, bytes);
    return view_csr(bytes, static_cast<int64_t>(plan.header.bytes));
  };
  const float* bias = m.bias.empty() ? nullptr : m.bias.data();
  const Activation activation = relu ? Activation::relu : Activation::none;
  std::vector<float> y(static_cast<size_t>(s.tokens) * last_rows + 1, -77.0f);
  const std::vector<ChainStage> stages = {
      {packed(m.w.data(), s.rows, s.cols, m.packed), bias, activation},
      {packed(w.data(), last_rows, s.rows, m.dense), nullptr, activation}};
  linear_chain_csr({m.x.data(), s.cols + s.x_gap, s.tokens, DType::f32, y.data(), last_rows}, stages);
  fault_in(r, w, fault);
  for (int t = 0; t < s.tokens; ++t) {
    std::vector<double> between(s.rows);
    for (int n = 0; n < s.rows; ++n) {
      double sum = bias ? bias[n] : 0.0;
      for (int k = 0; k < s.cols; ++k) sum += m.w[n * s.cols + k] * m.x[t * (s.cols + s.x_gap) + k];
      between[n] = relu ? std::max(sum, 0.0) : sum;
    }
    for (int n = 0; n < last_rows; ++n) {
      double want = 0.0;
      for (int k = 0; k < s.rows; ++k) want += w[n * s.rows + k] * between[k];
      if (relu) want = std::max(want, 0.0);
      if (y[t * last_rows + n] != want) out.differ(t * last_rows + n, y[t * last_rows + n], want);
    }
  }
}

void run_bitmap(const DenseView& w, const LinearArgs& a, Memory& m) {
  const BitmapPlan plan = plan_bitmap(w);
  auto* bytes = m.packed.get<uint8_t>(plan.header.bytes);
  pack_bitmap(w, plan, bytes);
  linear_bitmap(a, view_bitmap(bytes, static_cast<int64_t>(plan.header.bytes)));
}

void run_pair(const DenseView& w, const LinearArgs& a, Memory& m) {
  const PairPlan plan = plan_pair(w);
  auto* bytes = m.packed.get<uint8_t>(plan.header.bytes);
  pack_pair(w, plan, bytes);
  const PairPacked pair = view_pair(bytes, static_cast<int64_t>(plan.header.bytes));
  linear_pair(a, pair);
}

// Weights of any byte, their scales powers of two.
void quantise(Random& r, const std::vector<float>& w, int64_t rows, Memory& m) {
  m.q.resize(w.size());
  std::transform(w.begin(), w.end(), m.q.begin(), [](float v) { return static_cast<int8_t>(v); });
  m.scales.resize(rows);
  for (float& s : m.scales) s = std::ldexp(1.0f, r.range(-3, 3));
}

// A static range that leaves integers as they are: scale 1, and a zero point that the inputs fit around.
ActivationRange some_range(Random& r) {
  if (r.one_in(2)) return {};
  return {1.0f, r.range(127, 128), 0, 255};
}

enum class Eight { int8, bitmap8, bsr8 };

template <Eight F>
void linear_eight(Random& r, bool fault, Memory& m, Outcome& out) {
  const Shape s = linear_shape(r);
  const bool relu = r.one_in(4);
  fill_linear(r, s, r.one_in(2) ? 127 : 3, 127, m);
  for (float& v : m.w)
    if (v != 0.0f && r.one_in(8)) v = -128.0f;
  quantise(r, m.w, s.rows, m);
  const DenseView q{m.q.data(), DType::i8, s.rows, s.cols, s.cols, 1};
  const LinearArgs a = linear_args(s, m, relu);
  if constexpr (F == Eight::bsr8) {
    const Bsr8Plan plan = plan_bsr8(q, {}, m.scales.data(), r.one_in(2) ? 1 : kQuadRows);
    auto* bytes = m.packed.get<uint8_t>(plan.panel.header.bytes);
    pack_bsr8(q, plan, bytes);
    linear_bsr8(a, view_bsr8(bytes, static_cast<int64_t>(plan.panel.header.bytes)));
  } else {
    const ActivationRange range = some_range(r);
    const Int8Source source{q, m.scales.data()};
    const PackedHeader header = plan_int8(source, {}, DType::f32, range);
    if constexpr (F == Eight::int8) {
      auto* bytes = m.packed.get<uint8_t>(header.bytes);
      pack_int8(source, range, header, bytes);
      linear_int8(a, view_int8(bytes, static_cast<int64_t>(header.bytes)));
    } else {
      const Bitmap8Plan plan = plan_bitmap8(source, header, range);
      auto* bytes = m.packed.get<uint8_t>(plan.header.bytes);
      pack_bitmap8(source, plan, bytes);
      linear_bitmap8(a, view_bitmap8(bytes, static_cast<int64_t>(plan.header.bytes)));
    }
  }
  fault_in(r, m.w, fault);
  check_linear(s, m, m.w, m.scales.data(), relu, out);
}

void linear_four(Random& r, bool fault, Memory& m, Outcome& out) {
  const Shape s = linear_shape(r);
  const bool relu = r.one_in(4);
  fill_linear(r, s, 7, 127, m);
  for (float& v : m.w)
    if (v != 0.0f && r.one_in(8)) v = -8.0f;
  const int group = 32 << r.range(0, 2), groups = (s.cols + group - 1) / group;
  quantise(r, m.w, static_cast<int64_t>(s.rows) * groups, m);
  const Int4View view{m.q.data(), m.scales.data(), s.rows, s.cols, DType::f32};
  const PackedHeader header = plan_int4(s.rows, s.cols, DType::f32, group);
  auto* bytes = m.packed.get<uint8_t>(header.bytes);
  pack_int4(view, group, header, bytes);
  linear_int4(linear_args(s, m, relu), view_int4(bytes, static_cast<int64_t>(header.bytes)));
  fault_in(r, m.w, fault);
  for (size_t i = 0; i < m.w.size(); ++i)  // exact: eighths of integers
    m.w[i] *= 8.0f * m.scales[i / s.cols * groups + i % s.cols / group];
  const std::vector<float> eighth(s.rows, 0.125f);
  check_linear(s, m, m.w, eighth.data(), relu, out);
}

void gemm(Random& r, bool fault, Memory& m, Outcome& out) {
  const Shape s = linear_shape(r);
  std::vector<int8_t> a(static_cast<size_t>(s.tokens) * s.cols + 1);
  std::vector<int8_t> b(static_cast<size_t>(s.rows) * s.cols + 1);
  for (auto* side : {&a, &b})
    for (int8_t& v : *side) v = static_cast<int8_t>(r.one_in(6) ? -128 : r.range(-128, 127));
  std::vector<int32_t> c(static_cast<size_t>(s.tokens) * s.rows + 1, -77);
  gemm_s8({a.data(), s.cols, s.tokens, b.data(), s.cols, s.rows, s.cols, c.data(), s.rows});
  fault_in(r, b, fault);
  for (int t = 0; t < s.tokens; ++t)
    for (int n = 0; n < s.rows; ++n) {
      int32_t want = 0;
      for (int k = 0; k < s.cols; ++k) want += a[t * s.cols + k] * b[n * s.cols + k];
      if (c[t * s.rows + n] != want) out.differ(t * s.rows + n, c[t * s.rows + n], want);
    }
}

// ---- conv2d

struct Image {
  int images, channels, height, width, filters, groups, kh, kw;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, out_h, out_w;
};

Image image_shape(Random& r) {
  Image s;
  s.images = r.one_in(8) ? 2 : 1;
  s.groups = r.one_in(4) ? r.range(2, 3) : 1;
  s.channels = r.one_in(12) ? r.range(16, 70) : r.range(1, 9);  // of a group, as filters are
  s.filters = r.one_in(12) ? r.range(15, 66) : r.range(1, 9);
  s.kh = r.range(1, 3);
  s.kw = r.range(1, 3);
  s.stride_h = r.one_in(3) ? r.range(2, 3) : 1;
  s.stride_w = r.one_in(3) ? r.range(2, 3) : 1;
  s.pad_h = r.range(0, 2);
  s.pad_w = r.range(0, 2);
  s.dilation_h = r.one_in(4) ? 2 : 1;
  s.dilation_w = r.one_in(4) ? 2 : 1;
  const int span_h = s.dilation_h * (s.kh - 1) + 1, span_w = s.dilation_w * (s.kw - 1) + 1;
  s.height = std::max(1, span_h - 2 * s.pad_h) + r.range(0, 5);
  s.width = std::max(1, span_w - 2 * s.pad_w) + (r.one_in(8) ? r.range(8, 40) : r.range(0, 5));
  s.out_h = (s.height + 2 * s.pad_h - span_h) / s.stride_h + 1;
  s.out_w = (s.width + 2 * s.pad_w - span_w) / s.stride_w + 1;
  if (r.one_in(16)) {  // planes of whole vectors under a 1x1 kernel, which are multiplied where they lie
    s.kh = s.kw = s.dilation_h = s.dilation_w = 1;
    s.pad_h = s.pad_w = 0;
    s.out_h = r.range(1, 5);
    s.out_w = 16 * r.range(1, 3);
    s.height = s.out_h * s.stride_h;
    s.width = s.out_w * s.stride_w;
  }
  return s;
}

// The first cache line's boundary from p on.
float* at_cache_line(float* p) {
  while (reinterpret_cast<uintptr_t>(p) % kCacheLine != 0) ++p;
  return p;
}

enum class Conv { csr, int8, bsr8 };

template <Conv F>
void convolution(Random& r, bool fault, Memory& m, Outcome& out) {
  const Image s = image_shape(r);
  const int most = F == Conv::csr ? 9 : 127, density = r.range(1, 16);
  const int channels = s.channels * s.groups, filters = s.filters * s.groups, taps = s.kh * s.kw;
  const bool last = r.one_in(2), relu = r.one_in(4);  // channels last
  m.w.assign(static_cast<size_t>(filters) * s.channels * taps, 0.0f);
  for (float& v : m.w)
    if (r.range(1, 16) <= density) v = static_cast<float>(r.range(-most, most));
  const int64_t plane = static_cast<int64_t>(s.height) * s.width, image = plane * channels;
  m.x.assign(s.images * image + kPanelGroup, 0.0f);
  float* const x = r.one_in(2) ? at_cache_line(m.x.data()) : m.x.data();
  for (int64_t i = 0; i < s.images * image; ++i) x[i] = static_cast<float>(r.range(-most, most));
  for (int n = 0; n < s.images; ++n) x[n * image + r.range(0, static_cast<int>(image) - 1)] = 127.0f;
  m.bias.resize(filters);
  for (float& b : m.bias) b = static_cast<float>(r.range(-9, 9));
  const int64_t out_plane = static_cast<int64_t>(s.out_h) * s.out_w;
  m.y.assign(s.images * filters * out_plane, -77.0f);
  const ConvArgs a{x,
                   DType::f32,
                   last ? ImageLayout::nhwc : ImageLayout::nchw,
                   s.images,
                   channels,
                   s.height,
                   s.width,
                   image,
                   plane,
                   channels,
                   s.stride_h,
                   s.stride_w,
                   s.pad_h,
                   s.pad_w,
                   s.dilation_h,
                   s.dilation_w,
                   s.out_h,
                   s.out_w,
                   m.bias.data(),
                   relu ? Activation::relu : Activation::none,
                   m.y.data()};
  const ConvShape conv{s.channels, s.kh, s.kw, s.groups};
  const int64_t cols = static_cast<int64_t>(s.channels) * taps;
  quantise(r, m.w, filters, m);
  if constexpr (F == Conv::csr) {
    std::fill(m.scales.begin(), m.scales.end(), 1.0f);
    const DenseView w{m.w.data(), DType::f32, filters, cols, cols, 1, s.groups};
    const PanelPlan plan =
        r.one_in(2) ? plan_csr(w, conv, PackedKind::csr, 1) : plan_csr(w, conv, PackedKind::bsr, kQuadRows);
    auto* bytes = m.packed.get<uint8_t>(plan.header.bytes);
    pack_csr(w, plan, bytes);
    conv2d_csr(a, view_csr(bytes, static_cast<int64_t>(plan.header.bytes)));
  } else {
    const DenseView q{m.q.data(), DType::i8, filters, cols, cols, 1, s.groups};
    if constexpr (F == Conv::int8) {
      const ActivationRange range = some_range(r);
      const Int8Source source{q, m.scales.data()};
      const PackedHeader header = plan_int8(source, conv, DType::f32, range);
      auto* bytes = m.packed.get<uint8_t>(header.bytes);
      pack_int8(source, range, header, bytes);
      conv2d_int8(a, view_int8(bytes, static_cast<int64_t>(header.bytes)));
    } else {
      const Bsr8Plan plan = plan_bsr8(q, conv, m.scales.data(), r.one_in(2) ? 1 : kQuadRows);
      auto* bytes = m.packed.get<uint8_t>(plan.panel.header.bytes);
      pack_bsr8(q, plan, bytes);
      conv2d_bsr8(a, view_bsr8(bytes, static_cast<int64_t>(plan.panel.header.bytes)));
    }
  }
  fault_in(r, m.w, fault);
  for (int n = 0; n < s.images; ++n)
    for (int f = 0; f < filters; ++f)
      for (int oy = 0; oy < s.out_h; ++oy)
        for (int ox = 0; ox < s.out_w; ++ox) {
          int64_t sum = 0;
          for (int c = 0; c < s.channels; ++c)
            for (int i = 0; i < s.kh; ++i)
              for (int j = 0; j < s.kw; ++j) {
                const int iy = oy * s.stride_h - s.pad_h + i * s.dilation_h;
                const int ix = ox * s.stride_w - s.pad_w + j * s.dilation_w;
                if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
                const int from = f / s.filters * s.channels + c;
                const int64_t pixel = static_cast<int64_t>(iy) * s.width + ix;
                sum += static_cast<int64_t>(
                           m.w[(static_cast<int64_t>(f) * s.channels + c) * taps + i * s.kw + j]) *
                       static_cast<int64_t>(
                           x[n * image + (last ? pixel * channels + from : from * plane + pixel)]);
              }
          double want = static_cast<double>(sum) * m.scales[f] + m.bias[f];
          if (relu) want = std::max(want, 0.0);
          const int64_t pixel = static_cast<int64_t>(oy) * s.out_w + ox;
          const int64_t at = n * filters * out_plane + (last ? pixel * filters + f : f * out_plane + pixel);
          if (m.y[at] != want) out.differ(at, m.y[at], want);
        }
}

// ---- attention

// Values that every dtype holds exactly, heads side by side in rows; masks of one sort or the other.
void attend(Random& r, bool fault, Memory& m, Outcome& out) {
  const DType dtype = r.one_in(4) ? (r.one_in(2) ? DType::f16 : DType::bf16) : DType::f32;
  const int batch = r.range(1, 2), groups = r.range(1, 2), shared = r.range(1, 2), heads = groups * shared;
  const int queries = r.size(20, 65), keys = r.size(20, 129), features = r.size(9, 17),
            values = r.size(9, 17);
  const bool causal = r.one_in(4);
  const int kind = r.range(0, 3);  // of mask: none, none, bytes, float32
  const float scale = static_cast<float>(r.range(-8, 8)) / 16.0f;
  const auto fill = [&](std::vector<float>& to, int64_t count) {
    to.resize(count);
    for (float& v : to) v = static_cast<float>(r.range(-12, 12)) / 4.0f;
  };
  fill(m.x, int64_t{batch} * queries * heads * features);
  fill(m.w, int64_t{batch} * keys * groups * features);
  fill(m.bias, int64_t{batch} * keys * groups * values);
  fill(m.scales, kind == 3 ? int64_t{batch} * queries * keys : 0);
  m.q.resize(kind == 2 ? int64_t{batch} * queries * keys : 0);
  for (int8_t& seen : m.q) seen = r.one_in(4) ? 0 : 1;
  m.y.assign(int64_t{batch} * queries * heads * values, -77.0f);

  // In 16 bits: the high halves are bfloat16; float16 goes through the store that rounds.
  std::vector<uint16_t> halves[4];
  const auto data = [&](int i, std::vector<float>& from) -> void* {
    if (dtype == DType::f32) return from.data();
    halves[i].resize(from.size() + 1);
    for (size_t j = 0; j < from.size(); ++j)
      halves[i][j] = dtype == DType::f16 ? float_to_f16(from[j]) : float_to_bf16(from[j]);
    return halves[i].data();
  };
  const auto rows = [](void* p, int64_t positions, int64_t count, int64_t width) {
    return Heads{p, positions * count * width, width, count * width};
  };
  AttentionArgs a{};
  a.q = rows(data(0, m.x), queries, heads, features), a.k = rows(data(1, m.w), keys, groups, features);
  a.v = rows(data(2, m.bias), keys, groups, values), a.y = rows(data(3, m.y), queries, heads, values);
  a.batch = batch, a.heads = heads, a.queries = queries, a.keys = keys, a.features = features;
  a.out_features = values, a.shared = shared, a.scale = scale, a.causal = causal, a.dtype = dtype;
  if (kind >= 2 && queries * keys > 0) {
    a.mask = kind == 2 ? static_cast<const void*>(m.q.data()) : m.scales.data();
    a.mask_bytes = kind == 2;
    const int64_t strides[] = {int64_t{queries} * keys, 0, keys, 1};
    std::copy_n(strides, 4, a.mask_strides);
  }
  attention(a);
  fault_in(r, m.bias, fault);

  // Rows of one head, as doubles; and what is added to its scores.
  const auto one = [](const std::vector<float>& from, int b, int h, int positions, int count, int width) {
    std::vector<double> to(static_cast<size_t>(positions) * width + 1);
    for (int p = 0; p < positions; ++p)
      for (int d = 0; d < width; ++d)
        to[p * width + d] = from[((int64_t{b} * positions + p) * count + h) * width + d];
    return to;
  };
  std::vector<double> y(static_cast<size_t>(queries) * values + 1), error(y.size()), mask;
  for (int b = 0; b < batch; ++b)
    for (int h = 0; h < heads; ++h) {
      const auto q = one(m.x, b, h, queries, heads, features),
                 k = one(m.w, b, h / shared, keys, groups, features),
                 v = one(m.bias, b, h / shared, keys, groups, values);
      mask.assign(static_cast<size_t>(queries) * keys + 1, 0.0);
      for (int64_t i = 0; kind >= 2 && i < int64_t{queries} * keys; ++i) {
        const int64_t at = b * int64_t{queries} * keys + i;
        mask[i] = kind == 3 ? m.scales[at] : m.q[at] ? 0.0 : -INFINITY;
      }
      attention_reference({q.data(), k.data(), v.data(), mask.data(), scale, causal, 1, queries, keys,
                           features, values, y.data(), error.data()});
      for (int p = 0; p < queries; ++p)
        for (int d = 0; d < values; ++d) {
          const int64_t at = ((int64_t{b} * queries + p) * heads + h) * values + d;
          const double got = dtype == DType::f32 ? m.y[at] : value_at(a.y.data, at, dtype);
          const double want = y[p * values + d];
          // Half a unit in the last place of the output, of 11 or 8 bits, 2^-25 where float16 has none.
          const double step = dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
          const double rounding = dtype == DType::f32 ? 0.0 : step * std::fabs(want) + 0x1p-24;
          if (!(std::fabs(got - want) <= 1.01 * (error[p * values + d] + rounding)))
            out.differ(at, got, want);
        }
    }
}

// ---- selection

void selection(Random& r, bool fault, Memory& m, Outcome& out) {
  const int rows = r.range(1, 4), cols = r.size(40, 66), k = r.range(0, cols);
  const bool few = r.one_in(2), absolute = r.one_in(2);  // few values: ties
  m.w.resize(static_cast<size_t>(rows) * cols);
  for (float& v : m.w) v = static_cast<float>(few ? r.range(-3, 3) : r.range(-100000, 100000));
  for (float& v : m.w)
    if (r.one_in(16)) v = -0.0f;
  const SelectKey key = absolute ? SelectKey::abs : SelectKey::identity;
  const NanRule nan{true, "w"};
  std::vector<uint8_t> mask(m.w.size() + 1, 7), all(m.w.size() + 1, 7);
  select_mask_rows({m.w.data(), rows, cols, cols, DType::f32, key}, k, nan, mask.data());
  uint8_t* masks[] = {all.data()};
  const auto total = static_cast<int64_t>(m.w.size());
  const int64_t many = total ? r.range(0, static_cast<int>(total)) : 0;
  const Threshold t = select_mask_global({{m.w.data(), total, DType::f32, key}}, many, nan, masks);
  fault_in(r, m.w, fault);
  // Whether element i is among the first `n` of [begin, end): fewer than n are above it or equal and before
  // it.
  const auto chosen = [&](int64_t i, int64_t begin, int64_t end, int64_t n) {
    const auto value = [&](int64_t e) { return absolute ? std::fabs(m.w[e]) : m.w[e]; };
    int64_t before = 0;
    for (int64_t e = begin; e < end; ++e) before += value(e) > value(i) || (value(e) == value(i) && e < i);
    return before < n;
  };
  int64_t above = 0;
  for (int64_t i = 0; i < total; ++i) {
    const int64_t row = i / cols * cols;
    if (mask[i] != chosen(i, row, row + cols, k)) out.differ(i, mask[i], chosen(i, row, row + cols, k));
    if (all[i] != chosen(i, 0, total, many)) out.differ(total + i, all[i], chosen(i, 0, total, many));
    const float v = absolute ? std::fabs(m.w[i]) : m.w[i];
    above += many > 0 && v > key_value(t.key);
  }
  if (above != t.above || t.above + t.ties != many)
    out.differ(2 * total, static_cast<double>(t.above), static_cast<double>(above));
}

struct Family {
  const char* name;
  void (*run)(Random&, bool fault, Memory&, Outcome&);
};

template <PackedKind KIND>
void linear_panel(Random& r, bool fault, Memory& m, Outcome& out) {
  const int entry_rows = KIND == PackedKind::csr || (KIND == PackedKind::bsr && r.one_in(4)) ? 1 : kQuadRows;
  linear_float(r, fault, m, out, [&](const DenseView& w, const LinearArgs& a, Memory& memory) {
    run_panel(KIND, entry_rows, w, a, memory);
  });
}

constexpr Family kFamilies[] = {
    {"csr", linear_panel<PackedKind::csr>},
    {"bsr", linear_panel<PackedKind::bsr>},
    {"dense", linear_panel<PackedKind::dense>},
    {"chain", chain},
    {"bitmap", [](Random& r, bool f, Memory& m, Outcome& o) { linear_float(r, f, m, o, run_bitmap); }},
    {"pair", [](Random& r, bool f, Memory& m, Outcome& o) { linear_float(r, f, m, o, run_pair); }},
    {"int8", linear_eight<Eight::int8>},
    {"bitmap8", linear_eight<Eight::bitmap8>},
    {"bsr8", linear_eight<Eight::bsr8>},
    {"int4", linear_four},
    {"gemm_s8", gemm},
    {"conv_csr", convolution<Conv::csr>},
    {"conv_int8", convolution<Conv::int8>},
    {"conv_bsr8", convolution<Conv::bsr8>},
    {"attention", attend},
    {"selection", selection},
};

}  // namespace

const std::vector<std::string>& random_families() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const Family& f : kFamilies) all.push_back(f.name);
    return all;
  }();
  return names;
}

RandomCases run_random_cases(const std::string& family, uint64_t seed, int64_t cases, bool fault) {
  for (const Family& f : kFamilies) {
    if (family != f.name) continue;
    RandomCases result;
    Memory memory;
    for (int64_t i = 0; i < cases; ++i) {
      // Seeds in a row are far apart in the generator's sequence.
      Random r((seed + static_cast<uint64_t>(i)) * 0xd1342543de82ef95u);
      Outcome out;
      f.run(r, fault, memory, out);
      if (!out.wrong) continue;
      if (result.failed++ == 0) {
        result.seed = seed + static_cast<uint64_t>(i);
        result.what = out.what;
      }
    }
    return result;
  }
  std::string known;
  for (const std::string& name : random_families()) known += (known.empty() ? "" : ", ") + name;
  throw ValueError(str("family: expected one of ", known, ", got '", family, "'"));
}

}  // namespace pared
