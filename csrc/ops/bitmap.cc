#include "ops/bitmap.h"

#include <algorithm>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {
namespace {

static_assert(kBitmapBlock < kBitmapStride, "a K block and a line of padding");
// Expansions that take as long as waking a second thread (10 us), twice over.
constexpr int64_t kMinVectorsPerThread = 1 << 15;

// `multiply`: the kernels for 1 to kBitmapMaxTokens tokens.
template <class Mask, class Value>
void linear(const LinearArgs& a, const BitmapPacked& w,
            bool (*const* multiply)(const BitmapArgs<Mask, Value>&)) {
  const BitmapShape s = w.shape();
  const Isa isa = active_isa();
  const auto* values = reinterpret_cast<const Value*>(w.values);
  const auto widen = kernel_for<rows_widen>(isa).fn;
  const auto store = kernel_for<rows_store>(isa).fn;
  const auto* masks = reinterpret_cast<const Mask*>(w.masks);
  const int64_t element = dtype_size(a.dtype), groups = s.groups();
  const int64_t batches = (a.tokens + kBitmapMaxTokens - 1) / kBitmapMaxTokens;
  // An expansion is worth about four multiply-adds.
  const int64_t work = groups * s.vectors() * (4 * batches + s.depth * a.tokens) / 5;
  const int64_t parts = std::min(
      {groups, static_cast<int64_t>(num_threads()), std::max<int64_t>(1, work / kMinVectorsPerThread)});

  parallel_for(0, parts, 1, [&](int64_t part0, int64_t part1) {
    thread_local Scratch x_memory, acc_memory;
    float* x = x_memory.get<float>(kBitmapMaxTokens * kBitmapStride);
    float* acc = acc_memory.get<float>(kBitmapPass * kBitmapMaxTokens * kBitmapLanes);
    const int64_t g0 = groups * part0 / parts, g1 = groups * part1 / parts;
    for (int64_t g = g0; g < g1;) {
      const int64_t pass = g / kBitmapPass * kBitmapPass;
      const int64_t end = std::min(g1, pass + s.groups_in(pass));
      for (int64_t i = 0; i < batches; ++i) {
        const int64_t first = a.tokens * i / batches;
        const auto tokens = static_cast<int32_t>(a.tokens * (i + 1) / batches - first);
        // A weight without inputs has no block; one call with no vectors clears the sums.
        for (int64_t b = 0; b < std::max<int64_t>(s.blocks(), 1); ++b) {
          const int64_t k = b * s.block_k * s.depth;
          const auto vectors = static_cast<int32_t>(s.vectors_in(b)), inputs = vectors * s.depth;
          widen({static_cast<const char*>(a.x) + (first * a.x_stride + k) * element, a.x_stride, a.dtype,
                 tokens, static_cast<int32_t>(std::min<int64_t>(inputs, s.cols - k)), inputs, x,
                 kBitmapStride});
          check_inside(multiply[tokens - 1]({masks + s.first_vector(g, b), values + w.starts[s.cell(g, b)],
                                             values + w.header->nnz, x, acc, static_cast<int32_t>(end - g),
                                             vectors, b > 0}));
        }
        const int64_t row = g * kBitmapLanes;
        store({acc, tokens, static_cast<int32_t>(std::min(s.rows, end * kBitmapLanes) - row),
               a.bias ? a.bias + row : nullptr, a.activation,
               static_cast<char*>(a.y) + (first * a.y_stride + row) * element, a.y_stride, a.dtype});
      }
      g = end;
    }
  });
}

}  // namespace

void linear_bitmap(const LinearArgs& a, const BitmapPacked& w) {
  if (a.tokens == 0 || w.header->rows == 0) return;
  const Isa isa = active_isa();
  if (bitmap_values(w.header->dtype) == DType::bf16)
    linear<uint32_t, uint16_t>(a, w, kernel_for<bitmap_bf16>(isa).fn);
  else linear<uint16_t, float>(a, w, kernel_for<bitmap_f32>(isa).fn);
}

void linear_pair(const LinearArgs& a, const PairPacked& w) {
  if (a.tokens <= w.few_tokens()) linear_bitmap(a, w.few);
  else linear_csr(a, w.many);
}

}  // namespace pared
