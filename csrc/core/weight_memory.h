// Where packed weights lie: behind each other in huge pages.
#pragma once

#include <cstddef>

namespace pared {

// Memory of `bytes` bytes, aligned to 64, for free_weight; null where there is none. From kSmallestWeight on
// it lies in huge pages, which weights share: read from memory in pages of 4 KB, a weight takes twice as
// long, for the walks through the page tables, and most layers have less than the 2 MB of one such page.
void* allocate_weight(size_t bytes);
void free_weight(void* data);

// Smaller ones are the allocator's: a process with a few of them should not pay for a huge page.
inline constexpr size_t kSmallestWeight = size_t{1} << 17;

}  // namespace pared
