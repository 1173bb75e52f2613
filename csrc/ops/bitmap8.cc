// Two ways, one result. Few tokens: every vector is expanded in a register and used for all of them. More:
// four groups of outputs by one K block are expanded into a tile that stays in L1, multiplied with the first
// tokens on the way, and the dense micro-kernel runs over it with the others, so that memory holds and moves
// the non-zeros alone.
//
// Threads share the outputs, not the tokens: a weight that two threads expand costs more than activations
// that two threads quantize.
#include "ops/bitmap8.h"

#include <algorithm>
#include <cstring>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"
#include "ops/linear_int8.h"

namespace pared {
namespace {

// Of quantized tokens, in L2. More than the dense format's, which reads its weight again for each block,
// where this one expands it: 64 tokens of 3072 inputs went in two blocks of 192 KB, 3 to 6 % longer than in
// one.
constexpr int64_t kBlockBytes = 512 * 1024;
constexpr int64_t kMaxBlockTokens = 192;
// Vectors' worth of work (about 1 ns each) below which a second thread, 5 us when it is awake, does not pay.
constexpr int64_t kMinVectorsPerThread = 1 << 13;
// Groups that one of several threads takes at a time: two tiles of the dense kernel.
constexpr int64_t kRunGroups = 2 * kGemmPanels;
static_assert(kBitmap8Block * kInt8Unit < kBitmap8Stride, "a K block and a line of padding");
static_assert(kBitmap8Block <= kGemmUnits, "a K block is one call of the micro-kernel");

// A block of tokens in bytes, and where its outputs go.
struct Tokens {
  const uint8_t* bytes;
  int64_t stride;
  const float* scales;
  int64_t first, count;
};

// The kernel for so many tokens, or null where the level expands a tile for them.
bitmap_u8s8::Fn* few_tokens(Isa isa, int64_t tokens) {
  return tokens >= 1 && tokens <= kBitmapMaxTokens ? kernel_for<bitmap_u8s8>(isa).fn[tokens - 1] : nullptr;
}

// Whether a level expands and multiplies at once. The scalar one has that and the separate steps, as the
// specification of either.
bool has_fused(Isa isa) {
  const auto& all = kernels<bitmap_expand_u8s8>();
  return std::any_of(all.begin(), all.end(), [&](const auto& k) {
    return k.isa == isa || (k.isa != Isa::scalar && isa_contains(isa, k.isa));
  });
}

class Product {
 public:
  Product(DType dtype, const SharedOutput<Bitmap8Packed>& out, Isa isa, bitmap_u8s8::Fn* few)
      : dtype_(dtype),
        out_(out),
        w_(out.w),
        s_(w_.shape()),
        store_(kernel_for<dequantize_store>(isa).fn),
        few_(few) {
    if (!few_) {
      if (has_fused(isa)) fused_ = kernel_for<bitmap_expand_u8s8>(isa).fn;
      if (!fused_ || isa == Isa::scalar) expand_ = kernel_for<bitmap_expand>(isa).fn;
      gemm_ = kernel_for<gemm_u8s8>(isa).fn;
    }
  }

  int64_t groups() const { return s_.groups(); }

  void run(const Tokens& t, int64_t g0, int64_t g1) const {
    if (few_) few(t, g0, g1);
    else many(t, g0, g1);
  }

 private:
  // At most kBitmapMaxTokens tokens, groups [g0, g1).
  void few(const Tokens& t, int64_t g0, int64_t g1) const {
    thread_local Scratch x_memory, acc_memory;
    auto* x = x_memory.get<uint8_t>(kBitmapMaxTokens * kBitmap8Stride);
    auto* acc = acc_memory.get<int32_t>(kBitmapPass * kBitmapMaxTokens * kInt8Panel);
    const int64_t group_sums = t.count * kInt8Panel;
    for_passes(g0, g1, [&](int64_t g, int64_t end) {
      for (int64_t b = 0; b < std::max<int64_t>(s_.blocks(), 1); ++b) {
        const auto vectors = static_cast<int32_t>(s_.vectors_in(b));
        const int64_t k = b * s_.block_k * kInt8Unit;
        for (int64_t i = 0; i < t.count; ++i)
          std::memcpy(x + i * kBitmap8Stride, t.bytes + i * t.stride + k, vectors * kInt8Unit);
        check_inside(
            few_({w_.masks + s_.first_vector(g, b), w_.values + w_.starts[s_.cell(g, b)],
                  w_.values + w_.header->nnz, x, acc, static_cast<int32_t>(end - g), vectors, b > 0}));
      }
      for (int64_t i = g; i < end; ++i) store(t, 0, t.count, i, 1, acc + (i - g) * group_sums, kInt8Panel);
    });
  }

  void many(const Tokens& t, int64_t g0, int64_t g1) const {
    thread_local Scratch tile_memory, acc_memory;
    constexpr int64_t acc_stride = kGemmPanels * kInt8Panel;
    auto* tile = tile_memory.get<int8_t>(kGemmPanels * kBitmap8Block * kInt8Panel * kInt8Unit);
    auto* acc = acc_memory.get<int32_t>(t.count * acc_stride);
    const int64_t shares = (t.count + kGemmTokens - 1) / kGemmTokens;
    for_passes(g0, g1, [&](int64_t p0, int64_t p1) {
      for (int64_t g = p0; g < p1; g += kGemmPanels) {
        const int panels = static_cast<int>(std::min<int64_t>(kGemmPanels, p1 - g));
        const int64_t blocks = std::max<int64_t>(s_.blocks(), 1);
        for (int64_t b = 0; b < blocks; ++b) {
          const auto vectors = static_cast<int32_t>(s_.vectors_in(b));
          const uint64_t* masks = w_.masks + s_.first_vector(g, b);
          const uint32_t* starts = w_.starts + s_.cell(g, b);
          const int8_t* end = w_.values + w_.header->nnz;
          const bool fused = fused_ && (!expand_ || shares == 1);
          if (!fused) check_inside(expand_({masks, w_.values + *starts, end, tile, panels, vectors}));
          for (int64_t i = 0; i < shares; ++i) {
            // Shares of nearly equal size, the larger first: one token alone after a full share would wait
            // out latencies, and the first has the expansion beside it.
            const int64_t m0 = (t.count * i + shares - 1) / shares;
            const int64_t m1 = (t.count * (i + 1) + shares - 1) / shares;
            const int64_t entry = (m1 - m0 - 1) * kGemmPanels + panels - 1;
            const uint8_t* x = t.bytes + m0 * t.stride + b * s_.block_k * kInt8Unit;
            int32_t* sums = acc + m0 * acc_stride;
            if (i == 0 && fused)
              check_inside(fused_[entry](
                  {masks, w_.values, end, starts, tile, vectors, x, t.stride, sums, acc_stride, b > 0}));
            else
              gemm_[entry]({x, t.stride, tile, static_cast<int64_t>(vectors) * kInt8Panel * kInt8Unit,
                            vectors, sums, acc_stride, b > 0});
            if (b == blocks - 1) store(t, m0, m1 - m0, g, panels, sums, acc_stride);
          }
        }
      }
    });
  }

  // fn(first group, end) for the part of each pass that lies in [g0, g1).
  template <class F>
  void for_passes(int64_t g0, int64_t g1, const F& fn) const {
    while (g0 < g1) {
      const int64_t pass = g0 / kBitmapPass * kBitmapPass;
      const int64_t end = std::min(g1, pass + s_.groups_in(pass));
      fn(g0, end);
      g0 = end;
    }
  }

  void store(const Tokens& t, int64_t token, int64_t count, int64_t group, int panels, const int32_t* acc,
             int64_t acc_stride) const {
    const int64_t n = group * kInt8Panel;
    store_({acc, acc_stride, w_.compensation + n, t.scales + token, w_.scales + n,
            static_cast<int32_t>(count),
            static_cast<int32_t>(std::min<int64_t>(panels * kInt8Panel, s_.rows - n)),
            out_.bias ? out_.bias + n : nullptr, out_.activation,
            static_cast<char*>(out_.y) + ((t.first + token) * out_.y_stride + n) * dtype_size(dtype_),
            out_.y_stride, dtype_});
  }

  const DType dtype_;
  const SharedOutput<Bitmap8Packed>& out_;
  const Bitmap8Packed& w_;
  const BitmapShape s_;
  dequantize_store::Fn* store_;
  bitmap_u8s8::Fn* few_;  // or one of the next two, and gemm_:
  bitmap_expand::Fn* expand_ = nullptr;
  bitmap_expand_u8s8::Fn* const* fused_ = nullptr;
  gemm_u8s8::Fn* const* gemm_ = nullptr;
};

}  // namespace

void linear_bitmap8(const LinearArgs& args, const Bitmap8Packed& w) {
  linear_shared(
      {args.x, args.x_stride, args.tokens, args.dtype},
      std::vector<SharedOutput<Bitmap8Packed>>{{w, args.bias, args.activation, args.y, args.y_stride}});
}

bool share_inputs(const Bitmap8Packed& a, const Bitmap8Packed& b) {
  return a.header->cols == b.header->cols && *a.activations == *b.activations;
}

void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<Bitmap8Packed>>& outputs) {
  const Isa isa = active_isa();
  const auto quantize = kernel_for<quantize_u8>(isa).fn;
  bitmap_u8s8::Fn* const few = few_tokens(isa, in.tokens);
  std::vector<Product> products;
  int64_t groups = 0;
  for (const auto& o : outputs) {
    products.emplace_back(in.dtype, o, isa, few);
    groups += products.back().groups();
  }
  if (in.tokens == 0 || groups == 0) return;
  const BitmapShape s = outputs[0].w.shape();
  const int64_t stride = int8_row_stride(s.vectors() * kInt8Unit);
  const int64_t most =
      few ? in.tokens : std::clamp<int64_t>(kBlockBytes / stride, kGemmTokens, kMaxBlockTokens);
  const int64_t blocks = (in.tokens + most - 1) / most;
  const ActivationRange& range = *outputs[0].w.activations;
  const int64_t work = groups * s.vectors() * (4 * blocks + in.tokens) / 5;
  const int64_t parts = std::min(
      {groups, static_cast<int64_t>(num_threads()), std::max<int64_t>(1, work / kMinVectorsPerThread)});
  const int64_t run_groups = parts == 1 ? groups : kRunGroups, runs = (groups + run_groups - 1) / run_groups;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = in.tokens * i / blocks, count = in.tokens * (i + 1) / blocks - first;
    parallel_items(runs, parts, [&](int64_t, Items items) {
      int64_t run = items.next();
      if (run < 0) return;
      thread_local Scratch bytes_memory, scales_memory;
      auto* bytes = bytes_memory.get<uint8_t>(count * stride);
      auto* scales = scales_memory.get<float>(count);
      quantize({static_cast<const char*>(in.x) + first * in.x_stride * dtype_size(in.dtype), in.x_stride,
                in.dtype, static_cast<int32_t>(count), static_cast<int32_t>(s.cols), range.scale, range.zero,
                range.low, range.high, bytes, stride, scales});
      do {
        // The groups of all weights in one line, of which a run may hold those of several.
        int64_t before = 0;
        for (const Product& p : products) {
          const int64_t g0 = std::max<int64_t>(run * run_groups - before, 0);
          const int64_t g1 = std::min((run + 1) * run_groups - before, p.groups());
          before += p.groups();
          if (g0 < g1) p.run({bytes, stride, scales, first, count}, g0, g1);
        }
      } while ((run = items.next()) >= 0);
    });
  }
}

}  // namespace pared
