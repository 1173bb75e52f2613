// The loop nest around the int8 micro-kernel:
//
//   for each thread's share of tokens, or of outputs where there are few tokens:
//     for each block of tokens whose bytes fit L2 beside the weights:      quantize it
//       for each four panels (64 outputs):
//         for each K block (up to 48 KB of weights: they come from L2 at a third of its rate):
//           for each group of up to 6 tokens: micro-kernel, sums in L1 or L2; fetches a share of the next
//           block
//             after the last block: scales, bias, activation, while the sums are in L1
//
// Where threads share the outputs each quantizes the tokens for itself: they are few, and a barrier costs
// more.
#include "ops/linear_int8.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"
#include "ops/gemm_ahead.h"

namespace pared {
namespace {

constexpr int64_t kBlockBytes = 192 * 1024;  // of quantized tokens
constexpr int64_t kMaxBlockTokens = 192;
constexpr int64_t kAccStride = kGemmPanels * kInt8Panel;
constexpr int64_t kBlockUnits = kGemmUnits;  // at most: 64 outputs by 768, 48 KB
// Below this many multiply-adds (5 us) a second thread does not pay.
constexpr int64_t kMinWorkPerThread = 1 << 21;
// Fewer tokens than this wait for the weights: reading those takes as long as the products of so many.
constexpr int64_t kFewTokens = 4;
// So many tokens wait for the weights alone, which AVX-512's tiles then read panel by panel, one stream from
// end to end; up to six read two panels side by side and fetch the next two. In longer rows of more than one
// token four panels stay side by side, as they do for more tokens: x would not stay in L1 beside a panel.
// (AVX2's tiles read one panel after the other anyway, and Arm's were not measured.)
constexpr int64_t kOneStream = 3, kShortUnits = 512;
// From here on threads share the tokens, so that each quantizes its own alone.
constexpr int64_t kMinTokensPerThread = 32;

static_assert(kGemmLine == kCacheLine, "a unit of a panel is what a prefetch fetches");

struct Product {
  const int8_t* weights;
  int64_t panels, units, panel_bytes;
};

// Unit range of K block b of `blocks`.
struct Units {
  int64_t first, count;
};
Units units_of(const Product& w, int64_t b, int64_t blocks) {
  const int64_t first = w.units * b / blocks;
  return {first, w.units * (b + 1) / blocks - first};
}

// run_product for up to kGemmTokens tokens, panel by panel, or two side by side.
template <class Done>
void run_panels(const Product& w, gemm_u8s8::Fn* const* table, const uint8_t* x, int64_t x_stride,
                int64_t tokens, int64_t p0, int64_t p1, int64_t blocks, int32_t* acc, const Done& done) {
  const int64_t width = tokens <= kOneStream ? 1 : 2;
  for (int64_t p = p0; p < p1; p += kGemmPanels) {
    const int64_t some = std::min<int64_t>(kGemmPanels, p1 - p);
    for (int64_t i = 0; i < some; i += width) {
      const int64_t n = std::min(width, some - i);
      const int8_t* panel = w.weights + (p + i) * w.panel_bytes;
      const bool next_panels = p + i + width + n <= w.panels;
      for (int64_t b = 0; b < blocks; ++b) {
        const Units k = units_of(w, b, blocks);
        GemmArgs args{x + k.first * kInt8Unit,
                      x_stride,
                      panel + k.first * kGemmLine,
                      w.panel_bytes,
                      static_cast<int32_t>(k.count),
                      acc + i * kInt8Panel,
                      kAccStride,
                      k.first > 0};
        if (width > 1 && (b + 1 < blocks || next_panels))
          args.ahead = {b + 1 < blocks ? args.w + k.count * kGemmLine : panel + width * w.panel_bytes,
                        w.panel_bytes, kGemmLine, static_cast<int32_t>(n)};
        table[(tokens - 1) * kGemmPanels + n - 1](args);
      }
    }
    done(0, tokens, p, static_cast<int>(some), acc, kAccStride);
  }
}

// Sums of `tokens` rows of bytes with panels [p0, p1); done(token, tokens, panel, panels, acc, stride) takes
// each tile.
template <class Done>
void run_product(const Product& w, gemm_u8s8::Fn* const* table, const uint8_t* x, int64_t x_stride,
                 int64_t tokens, int64_t p0, int64_t p1, int32_t* acc, const Done& done) {
  const int64_t groups = (tokens + kGemmTokens - 1) / kGemmTokens;
  const int64_t blocks = std::max<int64_t>((w.units + kBlockUnits - 1) / kBlockUnits, 1);
  if (groups == 1 && (tokens == 1 || w.units <= kShortUnits) && isa_contains(active_isa(), Isa::avx512))
    return run_panels(w, table, x, x_stride, tokens, p0, p1, blocks, acc, done);
  // Block i of those that follow each other from p0 on; also beyond p1, for another thread may have finished
  // its panels before this one, which then goes on there.
  const auto block = [&](int64_t i) {
    const int64_t p = p0 + i / blocks * kGemmPanels;
    const Units k = units_of(w, i % blocks, blocks);
    return GemmBlock{p, std::min<int64_t>(kGemmPanels, (p < p1 ? p1 : w.panels) - p), k.first, k.count};
  };
  GemmBlock next = block(0);
  for (int64_t i = 1; next.panel < p1; ++i) {
    const GemmBlock now = next;
    next = block(i);
    const bool last = next.panel != now.panel;
    for (int64_t g = 0; g < groups; ++g) {
      // Groups of nearly equal size: one token alone after a full group would wait out latencies.
      const int64_t t0 = tokens * g / groups, t1 = tokens * (g + 1) / groups;
      int32_t* to = acc + t0 * kAccStride;
      GemmArgs args{x + t0 * x_stride + now.k * kInt8Unit,
                    x_stride,
                    w.weights + now.panel * w.panel_bytes + now.k * kGemmLine,
                    w.panel_bytes,
                    static_cast<int32_t>(now.units),
                    to,
                    kAccStride,
                    now.k > 0};
      args.ahead = gemm_ahead(w.weights, w.panel_bytes, next, g, groups, now);
      table[(t1 - t0 - 1) * kGemmPanels + now.panels - 1](args);
      if (last) done(t0, t1 - t0, now.panel, static_cast<int>(now.panels), to, kAccStride);
    }
  }
}

// Calls fn(first token, end, runs) for blocks of up to `block` tokens, in all threads; runs(p0, p1) gives the
// next run of panels that the caller is to do for them, and false when none is left.
template <class Fn>
void share(int64_t tokens, int64_t panels, int64_t units, int64_t block, const Fn& fn) {
  const int64_t work = std::max(tokens, kFewTokens) * panels * units * kInt8Panel * kInt8Unit;
  const int64_t parts = std::min<int64_t>(num_threads(), std::max<int64_t>(1, work / kMinWorkPerThread));
  const bool by_tokens = tokens >= parts * kMinTokensPerThread || panels < parts;
  if (parts > 1 && !by_tokens && tokens <= block) {
    // Few tokens are quick work: a thread that finds the other one still waking goes on with its panels.
    const int64_t runs = (panels + kGemmPanels - 1) / kGemmPanels;
    return parallel_items(runs, parts, [&](int64_t, Items items) {
      fn(0, tokens, [&](int64_t& p0, int64_t& p1) {
        const int64_t i = items.next();
        p0 = i * kGemmPanels;
        p1 = std::min(panels, p0 + kGemmPanels);
        return i >= 0;
      });
    });
  }
  parallel_for(0, parts, 1, [&](int64_t i0, int64_t i1) {
    const int64_t t0 = by_tokens ? tokens * i0 / parts : 0, t1 = by_tokens ? tokens * i1 / parts : tokens;
    const int64_t blocks = (t1 - t0 + block - 1) / block;
    for (int64_t b = 0; b < blocks; ++b) {
      bool left = true;
      fn(t0 + (t1 - t0) * b / blocks, t0 + (t1 - t0) * (b + 1) / blocks, [&](int64_t& p0, int64_t& p1) {
        p0 = by_tokens ? 0 : panels * i0 / parts;
        p1 = by_tokens ? panels : panels * i1 / parts;
        return std::exchange(left, false);
      });
    }
  });
}

}  // namespace

int64_t int8_row_stride(int64_t cols) {
  const int64_t lines = static_cast<int64_t>(round_up(cols, kCacheLine) / kCacheLine);
  return (lines | 1) * static_cast<int64_t>(kCacheLine);
}

void linear_int8(const LinearArgs& args, const Int8Packed& w) {
  linear_shared(
      {args.x, args.x_stride, args.tokens, args.dtype},
      std::vector<SharedOutput<Int8Packed>>{{w, args.bias, args.activation, args.y, args.y_stride}});
}

bool share_inputs(const Int8Packed& a, const Int8Packed& b) {
  return a.header->cols == b.header->cols && *a.activations == *b.activations;
}

void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<Int8Packed>>& outputs) {
  int64_t all_panels = 0;
  for (const auto& o : outputs) all_panels += o.w.panels();
  if (in.tokens == 0 || all_panels == 0) return;
  const Int8Packed& first = outputs[0].w;
  const int64_t cols = first.header->cols, units = first.units(), panel_bytes = first.panel_bytes();
  const Isa isa = active_isa();
  const auto quantize = kernel_for<quantize_u8>(isa).fn;
  const auto table = kernel_for<gemm_u8s8>(isa).fn;
  const auto store = kernel_for<dequantize_store>(isa).fn;
  const int64_t element = dtype_size(in.dtype), x_stride = int8_row_stride(cols);
  const int64_t block = std::clamp<int64_t>(kBlockBytes / x_stride, kGemmTokens, kMaxBlockTokens);
  const ActivationRange& range = *first.activations;
  // The panels of all weights in one line, of which a run may hold those of several.
  share(in.tokens, all_panels, units, block, [&](int64_t m0, int64_t m1, const auto& runs) {
    int64_t p0, p1;
    if (!runs(p0, p1)) return;
    thread_local Scratch bytes_memory, acc_memory, scales_memory;
    auto* bytes = bytes_memory.get<uint8_t>((m1 - m0) * x_stride);
    auto* acc = acc_memory.get<int32_t>((m1 - m0) * kGemmPanels * kInt8Panel);
    auto* scales = scales_memory.get<float>(m1 - m0);
    quantize({static_cast<const char*>(in.x) + m0 * in.x_stride * element, in.x_stride, in.dtype,
              static_cast<int32_t>(m1 - m0), static_cast<int32_t>(cols), range.scale, range.zero, range.low,
              range.high, bytes, x_stride, scales});
    do {
      int64_t before = 0;
      for (const auto& o : outputs) {
        const Int8Packed& w = o.w;
        const int64_t from = std::max<int64_t>(p0 - before, 0), to = std::min(p1 - before, w.panels());
        before += w.panels();
        if (from >= to) continue;
        run_product({w.weights, w.panels(), units, panel_bytes}, table, bytes, x_stride, m1 - m0, from, to,
                    acc,
                    [&](int64_t token, int64_t tokens, int64_t panel, int panels, const int32_t* sums,
                        int64_t stride) {
                      const int64_t n = panel * kInt8Panel;
                      store({sums, stride, w.compensation + n, scales + token, w.scales + n,
                             static_cast<int32_t>(tokens),
                             static_cast<int32_t>(std::min<int64_t>(panels * kInt8Panel, w.header->rows - n)),
                             o.bias ? o.bias + n : nullptr, o.activation,
                             static_cast<char*>(o.y) + ((m0 + token) * o.y_stride + n) * element, o.y_stride,
                             in.dtype});
                    });
      }
    } while (runs(p0, p1));
  });
}

void gemm_s8(const GemmS8Args& args) {
  if (args.rows == 0 || args.outputs == 0) return;
  const auto table = kernel_for<gemm_u8s8>(active_isa()).fn;
  const int64_t units = (args.cols + kInt8Unit - 1) / kInt8Unit, x_stride = int8_row_stride(args.cols);
  const int64_t panels = (args.outputs + kInt8Panel - 1) / kInt8Panel;
  const int64_t panel_bytes = units * kInt8Panel * kInt8Unit;
  const int64_t block = std::clamp<int64_t>(kBlockBytes / x_stride, kGemmTokens, kMaxBlockTokens);
  // b is packed once for all threads; its column sums take the bias of a's unsigned form away again.
  thread_local Scratch packed_memory, sums_memory;
  auto* packed = packed_memory.get<int8_t>(panels * panel_bytes);
  auto* sums = sums_memory.get<uint32_t>(panels * kInt8Panel);
  parallel_for(0, panels, 8, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      int8_t* to = packed + p * panel_bytes;
      for (int64_t j = 0; j < kInt8Panel; ++j) {
        const int64_t n = p * kInt8Panel + j;
        uint32_t sum = 0;
        for (int64_t k = 0; k < units * kInt8Unit; ++k) {
          const int8_t v = n < args.outputs && k < args.cols ? args.b[n * args.b_stride + k] : int8_t{0};
          to[(k / kInt8Unit * kInt8Panel + j) * kInt8Unit + k % kInt8Unit] = v;
          sum += static_cast<uint32_t>(int32_t{v});
        }
        sums[n] = 128u * sum;
      }
    }
  });
  share(args.rows, panels, units, block, [&](int64_t m0, int64_t m1, const auto& runs) {
    int64_t p0, p1;
    if (!runs(p0, p1)) return;
    thread_local Scratch bytes_memory, acc_memory;
    auto* bytes = bytes_memory.get<uint8_t>((m1 - m0) * x_stride);
    auto* acc = acc_memory.get<int32_t>((m1 - m0) * kGemmPanels * kInt8Panel);
    for (int64_t m = m0; m < m1; ++m)
      for (int64_t k = 0; k < units * kInt8Unit; ++k)
        bytes[(m - m0) * x_stride + k] =
            k < args.cols ? static_cast<uint8_t>(args.a[m * args.a_stride + k] + 128) : uint8_t{0};
    do {
      run_product(
          {packed, panels, units, panel_bytes}, table, bytes, x_stride, m1 - m0, p0, p1, acc,
          [&](int64_t token, int64_t tokens, int64_t panel, int count, const int32_t* from, int64_t stride) {
            const int64_t n = panel * kInt8Panel;
            const int64_t outputs = std::min<int64_t>(count * kInt8Panel, args.outputs - n);
            for (int64_t m = 0; m < tokens; ++m)
              for (int64_t j = 0; j < outputs; ++j)
                args.c[(m0 + token + m) * args.c_stride + n + j] =
                    static_cast<int32_t>(static_cast<uint32_t>(from[m * stride + j]) - sums[n + j]);
          });
    } while (runs(p0, p1));
  });
}

}  // namespace pared
