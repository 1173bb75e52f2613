#include "ops/encoder.h"

#include <algorithm>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"
#include "ops/attention.h"
#include "ops/layer_norm.h"

namespace pared {
namespace {

// Rows (tokens of whole sequences) that go through the layer together: enough for the widest tile, and few
// enough that what lies between two operations stays in the second-level cache, or close to it.
constexpr int64_t kRows = 128;

// Rows of a matrix, or of three side by side.
struct Matrix {
  float* data;
  int64_t stride;
  float* row(int64_t r) const { return data + r * stride; }
};

// A normalisation in float32.
struct Norm {
  const float *weight, *bias;
  float eps;
};

struct Norms {
  Norm first, second;
};

struct Workspace {
  Matrix qkv, heads, hidden, wide;
  Matrix x, y;  // in float32, where the layer's own are not
};

void apply(const EncoderLinear& l, const Matrix& x, int64_t rows, const Matrix& y) {
  linear({x.data, x.stride, rows, DType::f32, l.bias, l.activation, y.data, y.stride}, l.w);
}

// Queries, keys and values side by side; their input is packed or quantised once for those that are alike.
void project(const EncoderLayer& l, const Matrix& x, int64_t rows, const Matrix& y) {
  const EncoderLinear* const parts[] = {&l.q, &l.k, &l.v};
  const int64_t width = header_of(l.q.w).rows;
  bool done[3] = {};
  for (int i = 0; i < 3; ++i) {
    std::vector<SharedOutput<LinearWeight>> outputs;
    for (int j = i; j < 3; ++j)
      if (!done[j] && (j == i || share_inputs(parts[i]->w, parts[j]->w))) {
        outputs.push_back({parts[j]->w, parts[j]->bias, parts[j]->activation, y.data + j * width, y.stride});
        done[j] = true;
      }
    if (!outputs.empty()) linear_shared({x.data, x.stride, rows, DType::f32}, outputs);
  }
}

// y = norm(x + residual); y may be x, and `sum`, where it is given, takes x + residual.
void norm(const Norm& n, int64_t features, const Matrix& x, const Matrix* residual, int64_t rows,
          const Matrix& y, const Matrix* sum = nullptr) {
  LayerNormArgs a{};
  a.x = x.data, a.x_stride = x.stride;
  if (residual) a.residual = residual->data, a.residual_stride = residual->stride;
  if (sum) a.sum = sum->data, a.sum_stride = sum->stride;
  a.dtype = DType::f32, a.rows = rows, a.cols = features;
  a.weight = n.weight, a.bias = n.bias, a.eps = n.eps;
  a.y = y.data, a.y_stride = y.stride;
  normalise(a);
}

// Sequences [first, first + count) through the attention: from w.qkv to w.heads.
void attend(const EncoderLayer& l, const EncoderArgs& a, int64_t first, int64_t count, const Workspace& w) {
  const int64_t width = header_of(l.q.w).rows, features = width / l.heads;
  const auto heads = [&](const Matrix& m, int64_t part) -> Heads {
    // The workspace has the order of the rows of x.
    return {m.data + part * width, (a.batch_first ? a.tokens : 1) * m.stride, features,
            (a.batch_first ? 1 : count) * m.stride};
  };
  AttentionArgs t{};
  t.q = heads(w.qkv, 0), t.k = heads(w.qkv, 1), t.v = heads(w.qkv, 2), t.y = heads(w.heads, 0);
  t.batch = count, t.heads = l.heads, t.queries = t.keys = a.tokens;
  t.features = t.out_features = features;
  t.shared = 1, t.scale = l.scale, t.causal = a.causal;
  t.mask_bytes = a.mask_bytes, t.mask_dtype = a.mask_dtype;
  std::copy_n(a.mask_strides, 4, t.mask_strides);
  if (a.mask)
    t.mask = static_cast<const char*>(a.mask) +
             first * a.mask_strides[0] * (a.mask_bytes ? 1 : dtype_size(a.mask_dtype));
  attention(t);
}

// The layer in float32, from w.x to w.y.
void compute(const EncoderLayer& l, const Norms& n, const EncoderArgs& a, int64_t first, int64_t count,
             const Workspace& w) {
  const int64_t rows = count * a.tokens;
  if (l.norm_first) norm(n.first, l.features, w.x, nullptr, rows, w.hidden);
  project(l, l.norm_first ? w.hidden : w.x, rows, w.qkv);
  attend(l, a, first, count, w);
  apply(l.out, w.heads, rows, w.hidden);
  if (l.norm_first) norm(n.second, l.features, w.hidden, &w.x, rows, w.hidden, &w.y);
  else norm(n.first, l.features, w.hidden, &w.x, rows, w.hidden);
  apply(l.up, w.hidden, rows, w.wide);
  if (!l.norm_first) {
    apply(l.down, w.wide, rows, w.y);
    return norm(n.second, l.features, w.y, &w.hidden, rows, w.y);
  }
  apply(l.down, w.wide, rows, w.heads);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < l.features; ++i) w.y.row(r)[i] += w.heads.row(r)[i];
}

void widen(const void* from, DType dtype, int64_t rows, int64_t features, const Matrix& to) {
  kernel_for<rows_widen>(active_isa())
      .fn({from, features, dtype, static_cast<int32_t>(rows), static_cast<int32_t>(features),
           static_cast<int32_t>(features), to.data, static_cast<int32_t>(to.stride)});
}

void narrow(const Matrix& from, int64_t rows, int64_t features, void* to, DType dtype) {
  const auto store = kernel_for<rows_store>(active_isa()).fn;
  for (int64_t r = 0; r < rows; ++r)
    store({from.row(r), 1, static_cast<int32_t>(features), nullptr, Activation{},
           static_cast<char*>(to) + r * features * dtype_size(dtype), features, dtype});
}

// Sequences [first, first + count): all of them where x is not batch_first.
void run(const EncoderLayer& l, const Norms& n, const EncoderArgs& a, int64_t first, int64_t count) {
  const int64_t rows = count * a.tokens, width = header_of(l.q.w).rows, wide = header_of(l.up.w).rows;
  const int64_t begin = first * a.tokens * l.features * dtype_size(a.dtype);
  const void* from = static_cast<const char*>(a.x) + begin;
  void* to = static_cast<char*>(a.y) + begin;
  const bool narrows = a.dtype != DType::f32;
  thread_local Scratch memory;
  const auto stride = [](int64_t n) { return static_cast<int64_t>(odd_lines(n, sizeof(float))); };
  const int64_t own = narrows ? stride(l.features) : 0;
  const int64_t sizes[] = {
      stride(3 * width), stride(std::max(width, l.features)), stride(l.features), stride(wide), own, own};
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  float* p = memory.get<float>(total * rows);
  Workspace w;
  Matrix* const parts[] = {&w.qkv, &w.heads, &w.hidden, &w.wide, &w.x, &w.y};
  for (int i = 0; i < 6; p += sizes[i] * rows, ++i) *parts[i] = {p, sizes[i]};
  if (narrows) {
    widen(from, a.dtype, rows, l.features, w.x);
  } else {
    w.x = {static_cast<float*>(const_cast<void*>(from)), l.features};
    w.y = {static_cast<float*>(to), l.features};
  }
  compute(l, n, a, first, count, w);
  if (narrows) narrow(w.y, rows, l.features, to, a.dtype);
}

}  // namespace

void encoder_layer(const EncoderLayer& l, const EncoderArgs& a) {
  if (a.batch * a.tokens == 0) return;
  thread_local Scratch memory;
  Norms n;
  float* p = memory.get<float>(4 * l.features);
  const auto vector = [&](const EncoderVector& v) -> const float* {
    if (!v.data || v.dtype == DType::f32) return static_cast<const float*>(v.data);
    float* wide = p;
    p += l.features;
    widen(v.data, v.dtype, 1, l.features, {wide, l.features});
    return wide;
  };
  n.first = {vector(l.first.weight), vector(l.first.bias), l.first.eps};
  n.second = {vector(l.second.weight), vector(l.second.bias), l.second.eps};
  if (!a.batch_first && a.batch > 1) return run(l, n, a, 0, a.batch);
  // Groups of whole sequences; as many as a multiple of the threads where there are that many, each thread
  // then runs its own without waiting for others. Otherwise the operations share out their own work.
  const int64_t threads = num_threads(), together = std::max<int64_t>(1, kRows / a.tokens);
  int64_t groups = (a.batch + together - 1) / together;
  groups = std::min(a.batch, (groups + threads - 1) / threads * threads);
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = a.batch * g / groups;
      run(l, n, a, first, a.batch * (g + 1) / groups - first);
    }
  };
  if (threads > 1 && groups % threads == 0) parallel_for(0, groups, 1, some);
  else some(0, groups);
}

}  // namespace pared
