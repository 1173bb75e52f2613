// One weight packed twice, for calls with few tokens and with many: a bitmap and a CSR weight in one buffer.
// Each is best where the other is not (formats/bitmap.h, formats/csr.h); a call takes the bitmap up to
// `few_tokens` tokens.
//
// Invariants: two complete packed weights of equal shape, dtype and non-zeros, 64-byte aligned, one behind
// the other behind the header; starts_at and values_at say where; few_tokens is stored as `tile`.
#pragma once

#include <cstdint>

#include "formats/bitmap.h"
#include "formats/csr.h"

namespace pared {

struct PairPacked {
  const PackedHeader* header;
  BitmapPacked few;
  CsrPacked many;

  int64_t few_tokens() const { return header->tile; }
};

struct PairPlan {
  PackedHeader header;
  BitmapPlan few;
  PanelPlan many;
};
PairPlan plan_pair(const DenseView& w);
void pack_pair(const DenseView& w, const PairPlan& plan, uint8_t* out);

// As for the other formats.
PairPacked view_pair(const uint8_t* data, int64_t bytes);
void validate_pair(const PairPacked& w);

}  // namespace pared
