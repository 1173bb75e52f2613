// 64-byte aligned scratch memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace pared {

inline constexpr size_t kCacheLine = 64;

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Elements between rows of `count` elements: an odd number of cache lines, lest the rows of a power of two
// fall into one set.
constexpr size_t odd_lines(size_t count, size_t element) {
  return (round_up(count * element, kCacheLine) / kCacheLine | 1) * kCacheLine / element;
}

// Grows, never shrinks, contents are not kept. For buffers that a call fills before it reads them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  template <class T>
  T* get(size_t count) {
    const size_t bytes = round_up(count * sizeof(T) + 1, kCacheLine);
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(kCacheLine, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pared
