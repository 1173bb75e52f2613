#include "formats/packed.h"

#include <cstring>
#include <initializer_list>

#include "core/aligned.h"
#include "core/check.h"

namespace pared {
namespace {

// FNV-1a over 8-byte words: fast enough to run at load, and any flipped bit changes it.
uint64_t hash_words(const uint8_t* data, size_t bytes, uint64_t hash) {
  for (size_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 29;
  }
  return hash;
}

// Of the header, its checksum field taken as zero, and of everything behind it in `buffer`.
uint64_t checksum(PackedHeader header, const uint8_t* buffer) {
  header.checksum = 0;
  const uint64_t hash =
      hash_words(reinterpret_cast<const uint8_t*>(&header), sizeof(header), 0xcbf29ce484222325u);
  return hash_words(buffer + sizeof(header), header.bytes - sizeof(header), hash);
}

// Whether `product` is the product of positive factors, without overflow.
bool is_product(int64_t product, std::initializer_list<int64_t> factors) {
  for (int64_t f : factors) {
    if (product % f != 0) return false;
    product /= f;
  }
  return product == 1;
}

}  // namespace

PackedHeader new_header(PackedKind kind, DType dtype, int64_t rows, int64_t cols) {
  PackedHeader h{};
  std::memcpy(h.magic, kPackedMagic, sizeof(h.magic));
  h.kind = kind;
  h.version = kPackedVersion;
  h.dtype = dtype;
  h.rows = rows;
  h.cols = cols;
  return h;
}

const PackedHeader& checked_header(const uint8_t* data, int64_t bytes) {
  PARED_CHECK(bytes >= static_cast<int64_t>(sizeof(PackedHeader)), "packed weight: expected at least ",
              sizeof(PackedHeader), " bytes, got ", bytes);
  const uintptr_t past = reinterpret_cast<uintptr_t>(data) % kCacheLine;
  PARED_CHECK(past == 0, "packed weight: expected 64-byte aligned memory, got an address ", past,
              " bytes past a boundary");
  const auto* h = reinterpret_cast<const PackedHeader*>(data);
  PARED_CHECK(std::memcmp(h->magic, kPackedMagic, sizeof(h->magic)) == 0,
              "packed weight: expected a buffer that pared packed, got other data");
  PARED_CHECK(h->version == kPackedVersion, "packed weight: expected version ", kPackedVersion, ", got ",
              h->version);
  PARED_CHECK(h->bytes == static_cast<uint64_t>(bytes), "packed weight: expected ", h->bytes, " bytes, got ",
              bytes);
  const bool float_type = h->dtype == DType::f32 || h->dtype == DType::f16 || h->dtype == DType::bf16;
  PARED_CHECK(float_type && h->rows >= 0 && h->rows < kMaxSize && h->cols >= 0 && h->cols < kMaxSize,
              "packed weight: expected a valid header, got a corrupt one");
  return *h;
}

void check_conv_shape(const PackedHeader& h) {
  const bool linear = h.channels == 0 && h.kh == 0 && h.kw == 0 && h.groups == 0;
  PARED_CHECK(linear || (h.channels > 0 && h.kh > 0 && h.kw > 0 && h.groups > 0 && h.rows % h.groups == 0 &&
                         is_product(h.cols, {h.channels, h.kh, h.kw, h.groups})),
              "packed weight: expected a consistent convolution shape, got a corrupt header");
}

void check_section(const PackedHeader& h, uint64_t at, uint64_t size) {
  PARED_CHECK(at % kCacheLine == 0 && at <= h.bytes && size <= h.bytes - at,
              "packed weight: expected sections inside the buffer, got a corrupt header");
}

void check_inside(bool inside) {
  PARED_CHECK(inside, "packed weight: expected entries inside the buffer, got a corrupt one");
}

void seal(const PackedHeader& h, uint8_t* out) {
  PackedHeader header = h;
  header.checksum = checksum(h, out);
  std::memcpy(out, &header, sizeof(header));
}

void check_sum(const PackedHeader& h) {
  PARED_CHECK(checksum(h, reinterpret_cast<const uint8_t*>(&h)) == h.checksum,
              "packed weight: expected checksum ", h.checksum, ", the contents give another");
}

}  // namespace pared
