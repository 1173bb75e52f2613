#include "ops/linear_int4.h"

#include <algorithm>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {
namespace {

constexpr int64_t kBlockBytes = 192 * 1024;   // of quantized tokens, which stay in L2 beside two panels
constexpr int64_t kMaxBlockTokens = 96;       // whole tiles of the micro-kernel
constexpr int64_t kBytesPerThread = 1 << 19;  // of weights, or a thread's start costs more than it saves
// From here on threads share the tokens, so that each quantizes its own alone.
constexpr int64_t kMinTokensPerThread = 32;

// Tokens as the micro-kernel takes them.
struct Tokens {
  uint8_t* bytes;
  int64_t stride;
  int32_t* sums;  // [tokens][groups]
  float* scales;
};

// To signed bytes with zeros behind the end, and 8 times the sum of each group: what nibbles of q + 8 add.
Tokens quantize_tokens(const LinearArgs& args, const Int4Packed& w, int64_t m0, int64_t tokens) {
  const int64_t cols = w.header->cols, groups = w.groups();
  thread_local Scratch bytes_memory, sums_memory, scales_memory;
  const auto stride = static_cast<int64_t>(round_up(groups * w.group + 1, kCacheLine));
  const Tokens t{bytes_memory.get<uint8_t>(tokens * stride), stride,
                 sums_memory.get<int32_t>(tokens * groups), scales_memory.get<float>(tokens)};
  kernel_for<quantize_u8>(active_isa())
      .fn({static_cast<const char*>(args.x) + m0 * args.x_stride * dtype_size(args.dtype), args.x_stride,
           args.dtype, static_cast<int32_t>(tokens), static_cast<int32_t>(cols), 0.0f, 128, 1, 255, t.bytes,
           stride, t.scales});
  for (int64_t m = 0; m < tokens; ++m) {
    uint8_t* row = t.bytes + m * stride;
    for (int64_t k = 0; k < cols; ++k) row[k] ^= 0x80;
    std::fill(row + cols, row + groups * w.group, uint8_t{0});
    const auto* q = reinterpret_cast<const int8_t*>(row);
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int32_t k = 0; k < w.group; ++k) sum += q[g * w.group + k];
      t.sums[m * groups + g] = 8 * sum;
    }
  }
  return t;
}

// Panels [p0, p1) for tokens m0 and following.
void multiply(const LinearArgs& args, const Int4Packed& w, const Tokens& t, int64_t m0, int64_t tokens,
              int64_t p0, int64_t p1) {
  const int64_t n = p0 * kInt8Panel, end = std::min(w.header->rows, p1 * kInt8Panel);
  if (n >= end) return;
  kernel_for<gemm_s8u4>(active_isa())
      .fn({reinterpret_cast<const int8_t*>(t.bytes), t.stride, t.sums, t.scales, static_cast<int32_t>(tokens),
           w.weights + p0 * w.panel_bytes(), w.panel_bytes(), static_cast<int32_t>(w.groups()), w.pairs(),
           static_cast<int32_t>(end - n), args.bias ? args.bias + n : nullptr, args.activation,
           static_cast<char*>(args.y) + (m0 * args.y_stride + n) * dtype_size(args.dtype), args.y_stride,
           args.dtype});
}

}  // namespace

void linear_int4(const LinearArgs& args, const Int4Packed& w) {
  if (args.tokens == 0 || w.header->rows == 0) return;
  const int64_t panels = w.panels(), row = std::max<int64_t>(1, w.groups() * w.group);
  const int64_t block = std::clamp<int64_t>(kBlockBytes / row, 6, kMaxBlockTokens);
  const int64_t work = panels * w.panel_bytes() * ((args.tokens + 3) / 4);
  const int64_t parts = std::min<int64_t>(num_threads(), std::max<int64_t>(1, work / kBytesPerThread));
  const bool by_tokens = args.tokens >= parts * kMinTokensPerThread;
  const auto blocks = [&](int64_t m0, int64_t m1, const auto& run) {
    for (int64_t m = m0; m < m1; m += block) {
      const int64_t tokens = std::min(block, m1 - m);
      run(quantize_tokens(args, w, m, tokens), m, tokens);
    }
  };
  if (!by_tokens || parts == 1) {
    return blocks(0, args.tokens, [&](const Tokens& t, int64_t m, int64_t tokens) {
      parallel_for(0, parts, 1, [&](int64_t i0, int64_t i1) {
        multiply(args, w, t, m, tokens, panels * i0 / parts, panels * i1 / parts);
      });
    });
  }
  parallel_for(0, parts, 1, [&](int64_t i0, int64_t i1) {
    blocks(args.tokens * i0 / parts, args.tokens * i1 / parts,
           [&](const Tokens& t, int64_t m, int64_t tokens) { multiply(args, w, t, m, tokens, 0, panels); });
  });
}

}  // namespace pared
