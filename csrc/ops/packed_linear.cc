#include "ops/packed_linear.h"

#include <type_traits>

#include "core/check.h"
#include "ops/bitmap.h"
#include "ops/bitmap8.h"
#include "ops/linear_int4.h"
#include "ops/linear_int8.h"

namespace pared {
namespace {

void run(const LinearArgs& a, const CsrPacked& w) { linear_csr(a, w); }
void run(const LinearArgs& a, const BitmapPacked& w) { linear_bitmap(a, w); }
void run(const LinearArgs& a, const PairPacked& w) { linear_pair(a, w); }
void run(const LinearArgs& a, const Int8Packed& w) { linear_int8(a, w); }
void run(const LinearArgs& a, const Bitmap8Packed& w) { linear_bitmap8(a, w); }
void run(const LinearArgs& a, const Bsr8Packed& w) { linear_bsr8(a, w); }
void run(const LinearArgs& a, const Int4Packed& w) { linear_int4(a, w); }

template <class Packed>
const PackedHeader& header(const Packed& w) {
  return *w.header;
}
const PackedHeader& header(const Bsr8Packed& w) { return *w.panel.header; }

// Whether linear_shared takes the format.
template <class Packed>
constexpr bool kShared = !(std::is_same_v<Packed, BitmapPacked> || std::is_same_v<Packed, PairPacked> ||
                           std::is_same_v<Packed, Int4Packed>);

LinearWeight read(const uint8_t* data, int64_t bytes) {
  switch (checked_header(data, bytes).kind) {
    case PackedKind::csr:
    case PackedKind::bsr:
    case PackedKind::dense: return view_csr(data, bytes);
    case PackedKind::bitmap: return view_bitmap(data, bytes);
    case PackedKind::pair: return view_pair(data, bytes);
    case PackedKind::int8: return view_int8(data, bytes);
    case PackedKind::bitmap8: return view_bitmap8(data, bytes);
    case PackedKind::bsr8: return view_bsr8(data, bytes);
    case PackedKind::int4: return view_int4(data, bytes);
  }
  throw ValueError("packed: expected a packed weight of a known format");
}

}  // namespace

LinearWeight view_linear(const uint8_t* data, int64_t bytes) {
  LinearWeight w = read(data, bytes);
  PARED_CHECK(header_of(w).kh == 0, "packed: expected a linear weight, got a convolution's");
  return w;
}

const PackedHeader& header_of(const LinearWeight& w) {
  return std::visit([](const auto& v) -> const PackedHeader& { return header(v); }, w);
}

void linear(const LinearArgs& args, const LinearWeight& w) {
  std::visit([&](const auto& v) { run(args, v); }, w);
}

bool share_inputs(const LinearWeight& a, const LinearWeight& b) {
  if (a.index() != b.index()) return false;
  return std::visit(
      [&](const auto& v) {
        using Packed = std::decay_t<decltype(v)>;
        if constexpr (kShared<Packed>) return share_inputs(v, std::get<Packed>(b));
        else return false;
      },
      a);
}

void linear_shared(const SharedInputs& in, const std::vector<SharedOutput<LinearWeight>>& outputs) {
  if (outputs.size() == 1) {
    const auto& o = outputs[0];
    return linear({in.x, in.x_stride, in.tokens, in.dtype, o.bias, o.activation, o.y, o.y_stride, o.residual},
                  o.w);
  }
  std::visit(
      [&](const auto& v) {
        using Packed = std::decay_t<decltype(v)>;
        if constexpr (kShared<Packed>) {
          std::vector<SharedOutput<Packed>> own;
          for (const auto& o : outputs)
            own.push_back({std::get<Packed>(o.w), o.bias, o.activation, o.y, o.y_stride, o.residual});
          linear_shared(in, own);
        } else {
          throw ValueError("packed: expected weights of a format that shares inputs");
        }
      },
      outputs[0].w);
}

}  // namespace pared
