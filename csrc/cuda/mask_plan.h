// Launch configuration: plain C++, so that it is tested on machines without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pared::cuda {

inline constexpr int kMaskThreads = 256;
inline constexpr int kMaskUnroll = 4;                   // 16-byte loads in flight a thread
inline constexpr int kMaskBlocksPerMultiprocessor = 6;  // what 40 registers a thread leave room for
inline constexpr int kLoadBytes = 16;

// n elements as `head` single ones up to the first 16-byte boundary of x, `vectors` loads of 16 bytes, and
// `tail` single ones. The grid strides over the vectors; head and tail are shorter than one block.
struct MaskPlan {
  int64_t head, vectors, tail;
  bool wide_stores;  // the mask is aligned to the bytes that one load of x becomes
  uint32_t blocks;   // 0 when there is nothing to do
};

// x is aligned to item_bytes (2 or 4), mask holds one byte an element.
inline MaskPlan plan_mask(uintptr_t x, uintptr_t mask, int64_t n, int item_bytes, int multiprocessors) {
  const int per_load = kLoadBytes / item_bytes;
  const auto misaligned = static_cast<int64_t>(x % kLoadBytes);
  MaskPlan p;
  p.head = std::min(n, misaligned ? (kLoadBytes - misaligned) / item_bytes : 0);
  p.vectors = (n - p.head) / per_load;
  p.tail = n - p.head - p.vectors * per_load;
  p.wide_stores = (mask + static_cast<uintptr_t>(p.head)) % static_cast<uintptr_t>(per_load) == 0;
  constexpr int64_t per_block = int64_t{kMaskThreads} * kMaskUnroll;
  const int64_t most = int64_t{multiprocessors} * kMaskBlocksPerMultiprocessor;
  p.blocks =
      n ? static_cast<uint32_t>(std::clamp<int64_t>((p.vectors + per_block - 1) / per_block, 1, most)) : 0;
  return p;
}

}  // namespace pared::cuda
