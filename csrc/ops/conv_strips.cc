#include "ops/conv_strips.h"

#include <algorithm>
#include <cstdint>

namespace pared {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile and entry take a multiply-add a vector, and the broadcast of the value, which is a load as those
// are.
constexpr double kBroadcast = 1.0;
// What vectors of two and of four pieces cost over whole ones, most of it when they are packed and stored:
// 56x56 images take 281 us in halves and 288 in rows of 64, 28x28 ones 263 in halves, 279 in quarters and 242
// in rows of 32 (64 and 128 filters, 3x3, 90 % zeros, one thread).
constexpr double kPieces[kMaxBands + 1] = {0, 1.0, 1.08, 0, 1.35};
// What a panel of im2col costs over one of strips: it is packed 2.3 times and comes half from L2; 1.4 times
// with a stride of two, whose taps share less.
constexpr double kIm2col = 1.3, kIm2colStrided = 1.1;

}  // namespace

ConvStrips::Cut ConvStrips::choose(int64_t images, int64_t out_h, int64_t out_w) {
  Cut best;
  for (int32_t bands = 1; bands <= kMaxBands; bands *= 2)
    for (int32_t parts = bands; parts >= 1; parts /= 2) {
      if (parts < bands && images == 1) continue;
      Cut c;
      c.bands = bands;
      c.image_bands = parts;
      c.band_rows = ceil_div(out_h, parts);
      c.row_tiles = ceil_div(c.band_rows, kPanelMaxGroups);
      c.columns = ceil_div(out_w, kPanelGroup / bands);
      c.sets = ceil_div(images * parts, bands);
      const double vectors = static_cast<double>(c.band_rows) + kBroadcast * static_cast<double>(c.row_tiles);
      c.cost = static_cast<double>(c.sets * c.columns) * vectors * kPieces[bands];
      if (best.sets == 0 || c.cost < best.cost) best = c;
    }
  return best;
}

bool ConvStrips::pay(int64_t images, int64_t out_h, int64_t out_w, bool strided) {
  const int64_t vectors = ceil_div(images * out_h * out_w, kPanelGroup);
  const double im2col =
      static_cast<double>(vectors) + kBroadcast * static_cast<double>(ceil_div(vectors, kPanelMaxGroups));
  return choose(images, out_h, out_w).cost <= (strided ? kIm2colStrided : kIm2col) * im2col;
}

ConvStrips::ConvStrips(const Planes& planes, int64_t images, int64_t out_h, int64_t out_w)
    : planes_(planes),
      images_(images),
      out_h_(out_h),
      out_w_(out_w),
      cut_(choose(images, out_h, out_w)),
      tap_lines_(UINT8_MAX + 1, 0) {
  const TapAxis& rows = planes.rows;
  const int64_t most = ceil_div(cut_.band_rows, cut_.row_tiles);
  std::vector<size_t> order(rows.shift.size()), segment(rows.shift.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return rows.phase[a] != rows.phase[b] ? rows.phase[a] < rows.phase[b] : rows.shift[a] < rows.shift[b];
  });
  for (size_t i : order) {
    const bool joins = !segments_.empty() && segments_.back().phase == rows.phase[i] &&
                       rows.shift[i] <= segments_.back().end;
    if (!joins) {
      segments_.push_back({rows.phase[i], rows.size[i], rows.shift[i], 0, column_lines_});
    } else {
      column_lines_ -= static_cast<int32_t>(segments_.back().end - segments_.back().begin);
    }
    Segment& s = segments_.back();
    s.end = rows.shift[i] + most;
    column_lines_ += static_cast<int32_t>(s.end - s.begin);
    segment[i] = segments_.size() - 1;
  }
  const size_t kw = planes.columns.shift.size();
  channel_lines_ = column_lines_ * static_cast<int32_t>(kw);
  for (size_t i = 0; i < order.size(); ++i)
    for (size_t j = 0; j < kw; ++j) {
      const Segment& s = segments_[segment[i]];
      tap_lines_[i * kw + j] =
          static_cast<uint16_t>(static_cast<int64_t>(j) * column_lines_ + s.line + rows.shift[i] - s.begin);
    }
}

PanelTiles ConvStrips::tiles() const {
  PanelTiles out;
  out.unit_stride = kPanelGroup;
  out.channel_lines = channel_lines_;
  out.tap_lines = tap_lines_;
  const int64_t count = cut_.sets * cut_.row_tiles * cut_.columns;
  out.tiles.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t rows = place(i).rows;
    out.tiles.push_back({i, rows * kPanelGroup, rows});
  }
  return out;
}

void ConvStrips::describe(const PanelTile& t, Tile& out) const {
  const Place p = place(t.first);
  const int64_t most = ceil_div(cut_.band_rows, cut_.row_tiles);
  const int32_t lanes = kPanelGroup / cut_.bands;
  Band bands[kMaxBands];
  for (int32_t b = 0; b < cut_.bands; ++b) {
    bands[b] = band_of(p, b);
    const int64_t row = bands[b].row + p.row;
    out.band_at[b] = bands[b].image * planes_.image_stride + row * planes_.pitch + p.column;
  }
  out.columns.clear();
  for (size_t j = 0; j < planes_.columns.shift.size(); ++j) {
    const int64_t column = p.column + planes_.columns.shift[j];
    const int64_t from = std::clamp<int64_t>(-column, 0, lanes),
                  to = std::clamp<int64_t>(planes_.columns.size[j] - column, from, lanes);
    out.columns.push_back({planes_.columns.phase[j] + planes_.columns.shift[j],
                           static_cast<int32_t>(j) * column_lines_, ((1u << (to - from)) - 1u) << from});
  }
  out.rows.clear();
  for (const Segment& s : segments_)
    for (int64_t r = s.begin; r < s.end - (most - p.rows); ++r) {
      uint32_t inside = 0;
      for (int32_t b = 0; b < cut_.bands; ++b) {
        const int64_t row = bands[b].row + p.row + r;
        if (bands[b].image < images_ && row >= 0 && row < s.size) inside |= 1u << b;
      }
      out.rows.push_back({s.phase + r * planes_.pitch, static_cast<int32_t>(s.line + r - s.begin), inside});
    }
}

}  // namespace pared
