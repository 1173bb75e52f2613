#include "ops/linear_int4.h"

#include <algorithm>

#include "core/aligned.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {
namespace {

constexpr int64_t kBlockTokens = 16;          // read each panel of weights from L1 or L2 again
constexpr int64_t kBytesPerThread = 1 << 19;  // of weights, or a thread's start costs more than it saves

}  // namespace

void linear_int4(const LinearArgs& args, const Int4Packed& w) {
  const int64_t rows = w.header->rows, cols = w.header->cols, groups = w.groups();
  if (args.tokens == 0 || rows == 0) return;
  const auto quantize = kernel_for<quantize_u8>(active_isa()).fn;
  const auto run = kernel_for<gemm_s8u4>(active_isa()).fn;
  const int64_t element = dtype_size(args.dtype);
  const int64_t x_stride = static_cast<int64_t>(round_up(groups * w.group + 1, kCacheLine));
  const int64_t work = w.panels() * w.panel_bytes() * ((args.tokens + 3) / 4);
  const int64_t parts = std::min<int64_t>(num_threads(), std::max<int64_t>(1, work / kBytesPerThread));
  thread_local Scratch bytes_memory, sums_memory, scales_memory;
  const int64_t most = std::min(kBlockTokens, args.tokens);
  auto* bytes = bytes_memory.get<uint8_t>(most * x_stride);
  auto* sums = sums_memory.get<int32_t>(most * groups);
  auto* scales = scales_memory.get<float>(most);
  for (int64_t m0 = 0; m0 < args.tokens; m0 += kBlockTokens) {
    const int64_t tokens = std::min(kBlockTokens, args.tokens - m0);
    quantize({static_cast<const char*>(args.x) + m0 * args.x_stride * element, args.x_stride, args.dtype,
              static_cast<int32_t>(tokens), static_cast<int32_t>(cols), 0.0f, 128, 1, 255, bytes, x_stride,
              scales});
    // To signed bytes, zeros behind the end, and 8 times the sum of each group: what nibbles of q + 8 add.
    for (int64_t m = 0; m < tokens; ++m) {
      uint8_t* row = bytes + m * x_stride;
      for (int64_t k = 0; k < cols; ++k) row[k] ^= 0x80;
      std::fill(row + cols, row + groups * w.group, uint8_t{0});
      const auto* q = reinterpret_cast<const int8_t*>(row);
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int32_t k = 0; k < w.group; ++k) sum += q[g * w.group + k];
        sums[m * groups + g] = 8 * sum;
      }
    }
    parallel_for(0, parts, 1, [&](int64_t i0, int64_t i1) {
      for (int64_t p = w.panels() * i0 / parts; p < w.panels() * i1 / parts; ++p) {
        const int64_t n = p * kInt8Panel;
        run({reinterpret_cast<const int8_t*>(bytes), x_stride, sums, scales, static_cast<int32_t>(tokens),
             w.weights + p * w.panel_bytes(), static_cast<int32_t>(groups), w.pairs(),
             static_cast<int32_t>(std::min<int64_t>(kInt8Panel, rows - n)),
             args.bias ? args.bias + n : nullptr, args.activation,
             static_cast<char*>(args.y) + (m0 * args.y_stride + n) * element, args.y_stride, args.dtype});
      }
    });
  }
}

}  // namespace pared
