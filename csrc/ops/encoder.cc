#include "ops/encoder.h"

#include <algorithm>

#include "core/aligned.h"
#include "core/parallel.h"
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

struct Workspace {
  Matrix qkv, heads, hidden, wide;
};

void apply(const EncoderLinear& l, const Matrix& x, int64_t rows, const Matrix& y) {
  l.w.run({x.data, x.stride, rows, DType::f32, l.bias, l.activation, y.data, y.stride});
}

// Queries, keys and values side by side; tokens are quantised once where the weights allow it.
void project(const EncoderLayer& l, const Matrix& x, int64_t rows, const Matrix& y) {
  const EncoderLinear* const parts[] = {&l.q, &l.k, &l.v};
  const int64_t width = l.q.w.header->rows;
  const auto shares = [&](const EncoderLinear& a) {
    return l.q.blocks && a.blocks && share_inputs(*l.q.blocks, *a.blocks);
  };
  if (shares(l.k) && shares(l.v)) {
    std::vector<SharedOutput<Bsr8Packed>> outputs;
    for (int i = 0; i < 3; ++i)
      outputs.push_back(
          {*parts[i]->blocks, parts[i]->bias, parts[i]->activation, y.data + i * width, y.stride});
    return linear_shared({x.data, x.stride, rows, DType::f32}, outputs);
  }
  for (int i = 0; i < 3; ++i) apply(*parts[i], x, rows, {y.data + i * width, y.stride});
}

// y = norm(x + residual); y may be x, and `sum`, where it is given, takes x + residual.
void norm(const EncoderNorm& n, int64_t features, const Matrix& x, const Matrix* residual, int64_t rows,
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
  const int64_t width = l.q.w.header->rows, features = width / l.heads;
  const auto heads = [&](const Matrix& m, int64_t part) -> Heads {
    // The workspace has the order of the rows of x.
    return {m.data + part * width, (a.batch_first ? a.tokens : 1) * m.stride, features,
            (a.batch_first ? 1 : count) * m.stride};
  };
  AttentionArgs t{};
  t.q = heads(w.qkv, 0), t.k = heads(w.qkv, 1), t.v = heads(w.qkv, 2), t.y = heads(w.heads, 0);
  t.batch = count, t.heads = l.heads, t.queries = t.keys = a.tokens;
  t.features = t.out_features = features;
  t.shared = 1, t.scale = l.scale, t.causal = a.causal, t.mask_bytes = a.mask_bytes;
  std::copy_n(a.mask_strides, 4, t.mask_strides);
  if (a.mask)
    t.mask =
        static_cast<const char*>(a.mask) + first * a.mask_strides[0] * (a.mask_bytes ? 1 : sizeof(float));
  attention(t);
}

// Sequences [first, first + count): all of them where x is not batch_first.
void run(const EncoderLayer& l, const EncoderArgs& a, int64_t first, int64_t count) {
  const int64_t rows = count * a.tokens, width = l.q.w.header->rows, wide = l.up.w.header->rows;
  const Matrix x{const_cast<float*>(a.x) + first * a.tokens * l.features, l.features};
  const Matrix y{a.y + first * a.tokens * l.features, l.features};
  thread_local Scratch memory;
  const auto stride = [](int64_t n) { return static_cast<int64_t>(odd_lines(n, sizeof(float))); };
  const int64_t sizes[] = {stride(3 * width), stride(std::max(width, l.features)), stride(l.features),
                           stride(wide)};
  float* p = memory.get<float>((sizes[0] + sizes[1] + sizes[2] + sizes[3]) * rows);
  Workspace w;
  Matrix* const parts[] = {&w.qkv, &w.heads, &w.hidden, &w.wide};
  for (int i = 0; i < 4; p += sizes[i] * rows, ++i) *parts[i] = {p, sizes[i]};

  if (l.norm_first) norm(l.first, l.features, x, nullptr, rows, w.hidden);
  project(l, l.norm_first ? w.hidden : x, rows, w.qkv);
  attend(l, a, first, count, w);
  apply(l.out, w.heads, rows, w.hidden);
  if (l.norm_first) norm(l.second, l.features, w.hidden, &x, rows, w.hidden, &y);
  else norm(l.first, l.features, w.hidden, &x, rows, w.hidden);
  apply(l.up, w.hidden, rows, w.wide);
  if (!l.norm_first) {
    apply(l.down, w.wide, rows, y);
    return norm(l.second, l.features, y, &w.hidden, rows, y);
  }
  apply(l.down, w.wide, rows, w.heads);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < l.features; ++i) y.row(r)[i] += w.heads.row(r)[i];
}

}  // namespace

void encoder_layer(const EncoderLayer& l, const EncoderArgs& a) {
  if (a.batch * a.tokens == 0) return;
  if (!a.batch_first && a.batch > 1) return run(l, a, 0, a.batch);
  // Groups of whole sequences; as many as a multiple of the threads where there are that many, each thread
  // then runs its own without waiting for others. Otherwise the operations share out their own work.
  const int64_t threads = num_threads(), together = std::max<int64_t>(1, kRows / a.tokens);
  int64_t groups = (a.batch + together - 1) / together;
  groups = std::min(a.batch, (groups + threads - 1) / threads * threads);
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = a.batch * g / groups;
      run(l, a, first, a.batch * (g + 1) / groups - first);
    }
  };
  if (threads > 1 && groups % threads == 0) parallel_for(0, groups, 1, some);
  else some(0, groups);
}

}  // namespace pared
