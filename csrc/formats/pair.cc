#include "formats/pair.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/aligned.h"
#include "core/check.h"

namespace pared {
namespace {

constexpr uint32_t kMaxFewTokens = 1u << 16;

// A CSR weight of up to this many bytes stays in a second-level cache from call to call.
constexpr uint64_t kCachedBytes = 1 << 20;

// Tokens up to which the bitmap is the faster one. Its time grows with the tokens and hardly with the
// density. CSR's hardly grows with the tokens up to 32, but with the density, and it doubles where the weight
// does not stay in L2: it moves half as much again.
// Measured on Zen 5, one thread, equal at 50, 80 and 90 % zeros: 768x768 at 40, 9 and 4 tokens, 3072x768 at
// 63, 30 and 12 (4096x4096, 80 %: 27).
uint32_t few_tokens(const PackedHeader& h, const PackedHeader& csr) {
  const double cells = static_cast<double>(h.rows) * static_cast<double>(h.cols);
  const double d = cells > 0 ? static_cast<double>(h.nnz) / cells : 0.0;
  const double equal = csr.bytes <= kCachedBytes ? 2 + 20 * d + 110 * d * d : 2 + 130 * d;
  return static_cast<uint32_t>(std::lround(std::min(equal, 64.0)));
}

}  // namespace

PairPlan plan_pair(const DenseView& w) {
  PairPlan plan{{}, plan_bitmap(w), plan_csr(w, {}, PackedKind::csr, 1)};
  PackedHeader& h = plan.header;
  h = new_header(PackedKind::pair, w.dtype, w.rows, w.cols);
  h.nnz = h.entries = plan.few.header.nnz;
  h.tile = few_tokens(h, plan.many.header);
  h.starts_at = round_up(sizeof(PackedHeader), kCacheLine);
  h.values_at = h.starts_at + plan.few.header.bytes;
  h.bytes = h.values_at + plan.many.header.bytes;
  return plan;
}

void pack_pair(const DenseView& w, const PairPlan& plan, uint8_t* out) {
  const PackedHeader& h = plan.header;
  std::memset(out, 0, h.starts_at);
  pack_bitmap(w, plan.few, out + h.starts_at);
  pack_csr(w, plan.many, out + h.values_at);
  seal(h, out);
}

PairPacked view_pair(const uint8_t* data, int64_t bytes) {
  const PackedHeader& h = checked_header(data, bytes);
  PARED_CHECK(h.kind == PackedKind::pair, "packed weight: expected a pair of packings, got kind ",
              static_cast<int>(h.kind));
  PARED_CHECK(h.starts_at == round_up(sizeof(PackedHeader), kCacheLine) && h.values_at > h.starts_at &&
                  h.values_at < h.bytes && h.values_at % kCacheLine == 0 && h.tile <= kMaxFewTokens &&
                  h.channels == 0 && h.kh == 0 && h.kw == 0 && h.groups == 0,
              "packed weight: expected a valid header, got a corrupt one");
  const PairPacked w{&h, view_bitmap(data + h.starts_at, static_cast<int64_t>(h.values_at - h.starts_at)),
                     view_csr(data + h.values_at, static_cast<int64_t>(h.bytes - h.values_at))};
  for (const PackedHeader* part : {w.few.header, w.many.header})
    PARED_CHECK(part->rows == h.rows && part->cols == h.cols && part->dtype == h.dtype &&
                    part->nnz == h.nnz && part->entries == h.entries && part->kh == 0,
                "packed weight: expected two packings of one weight, got a corrupt header");
  return w;
}

void validate_pair(const PairPacked& w) {
  check_sum(*w.header);
  PARED_CHECK(w.header->tile == few_tokens(*w.header, *w.many.header) && w.header->entry_rows == 0 &&
                  w.header->block_k == 0 && w.header->counts_at == 0 && w.header->offsets_at == 0,
              "packed weight: expected a valid header, got a corrupt one");
  validate_bitmap(w.few);
  validate_csr(w.many);
}

}  // namespace pared
