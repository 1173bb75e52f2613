#include "ops/packed_linear.h"

#include "core/check.h"
#include "formats/bitmap.h"
#include "formats/bitmap8.h"
#include "formats/formats.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/pair.h"
#include "ops/bitmap.h"
#include "ops/bitmap8.h"
#include "ops/linear_int4.h"
#include "ops/linear_int8.h"

namespace pared {
namespace {

PackedLinear read(const uint8_t* data, int64_t bytes) {
  switch (checked_header(data, bytes).kind) {
    case PackedKind::csr:
    case PackedKind::bsr:
    case PackedKind::dense: {
      const CsrPacked w = view_csr(data, bytes);
      return {w.header, [w](const LinearArgs& a) { linear_csr(a, w); }};
    }
    case PackedKind::bitmap: {
      const BitmapPacked w = view_bitmap(data, bytes);
      return {w.header, [w](const LinearArgs& a) { linear_bitmap(a, w); }};
    }
    case PackedKind::pair: {
      const PairPacked w = view_pair(data, bytes);
      return {w.header, [w](const LinearArgs& a) {
                if (a.tokens <= w.few_tokens()) linear_bitmap(a, w.few);
                else linear_csr(a, w.many);
              }};
    }
    case PackedKind::int8: {
      const Int8Packed w = view_int8(data, bytes);
      return {w.header, [w](const LinearArgs& a) { linear_int8(a, w); }};
    }
    case PackedKind::bitmap8: {
      const Bitmap8Packed w = view_bitmap8(data, bytes);
      return {w.header, [w](const LinearArgs& a) { linear_bitmap8(a, w); }};
    }
    case PackedKind::bsr8: {
      const Bsr8Packed w = view_bsr8(data, bytes);
      return {w.panel.header, [w](const LinearArgs& a) { linear_bsr8(a, w); }};
    }
    case PackedKind::int4: {
      const Int4Packed w = view_int4(data, bytes);
      return {w.header, [w](const LinearArgs& a) { linear_int4(a, w); }};
    }
  }
  throw ValueError("packed: expected a packed weight of a known format");
}

}  // namespace

PackedLinear packed_linear(const uint8_t* data, int64_t bytes) {
  PackedLinear w = read(data, bytes);
  PARED_CHECK(w.header->kh == 0, "packed: expected a linear weight, got a convolution's");
  return w;
}

}  // namespace pared
