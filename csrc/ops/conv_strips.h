// Panels of larger convolution kernels, as strips. im2col writes an element once for each tap that reads it;
// a strip writes it once for each column of the kernel: 27 vectors a channel instead of 63, for a 3x3 kernel
// and a tile of seven vectors.
//
// A tile is up to eight output rows of one run of columns, a vector is a row of it. Tap (i, j) reads, for
// output row r, the elements of input row r + i shifted by j, so the vectors of tap (i, j) are those of tap
// (0, j) from line i on, in which a strip is kept for each j. An entry of the weight is then a line, and the
// micro-kernel multiplies as it does with any panel. With a stride each phase of the rows has strips of its
// own, and with a dilation a strip is as long as the taps are apart.
//
// Rows of 56 or 7 outputs are no whole vectors. So a vector may be two or four narrower runs, one from each
// band of the image's rows, or of several images: 56 columns are seven vectors of eight columns by two
// halves.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/types.h"
#include "ops/panel_product.h"

namespace pared {

// Where the taps along one axis read: output o of tap t reads element o + shift[t] of a phase that holds
// `size[t]` elements a plane and lies at `phase[t]` in the channel.
struct TapAxis {
  std::vector<int64_t> phase, shift, size;
};

// Planes in which neighbouring outputs read neighbouring elements.
struct Planes {
  const float* x;
  int64_t image_stride, channel_stride, pitch;  // elements; pitch between rows
  int64_t readable;                             // elements of a channel from its first on
  TapAxis rows, columns;

  // Of tap (i, j) of output (0, 0), from the channel's first element.
  int64_t tap_offset(size_t i, size_t j) const {
    return rows.phase[i] + columns.phase[j] + rows.shift[i] * pitch + columns.shift[j];
  }
};

class ConvStrips {
 public:
  // Whether strips take less than im2col for outputs of this size: not where these have so few rows that
  // tiles are narrow, or a width that fills vectors badly.
  static bool pay(int64_t images, int64_t out_h, int64_t out_w, bool strided);

  ConvStrips(const Planes& planes, int64_t images, int64_t out_h, int64_t out_w);

  // Tiles whose `first` is a number that the functions below know.
  PanelTiles tiles() const;

  // What the packer needs for one tile.
  struct Tile {
    std::vector<ConvStripRow> rows;
    std::vector<ConvStripColumn> columns;
    int64_t band_at[kMaxBands];
  };
  void describe(const PanelTile& t, Tile& out) const;

  ConvStripArgs pack_args(const Tile& tile, int64_t channel, int32_t channels, float* panel) const {
    return {planes_.x + channel * planes_.channel_stride,
            planes_.channel_stride,
            channels,
            channel_lines_,
            tile.rows.data(),
            tile.columns.data(),
            static_cast<int32_t>(tile.rows.size()),
            static_cast<int32_t>(tile.columns.size()),
            cut_.bands,
            tile.band_at,
            panel};
  }

  // Calls fn(first, count, image, position): `count` positions of the tile from `first` on are those from
  // `position` on of the image's output plane.
  template <class F>
  void for_spans(const PanelTile& t, F fn) const {
    const Place p = place(t.first);
    const int32_t lanes = kPanelGroup / cut_.bands;
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(lanes, out_w_ - p.column));
    for (int32_t v = 0; v < t.vectors; ++v)
      for (int32_t b = 0; b < cut_.bands; ++b) {
        const Band band = band_of(p, b);
        const int64_t row = band.row + p.row + v;
        if (band.image < images_ && p.row + v < cut_.band_rows && row < out_h_)
          fn(v * kPanelGroup + b * lanes, count, band.image, row * out_w_ + p.column);
      }
  }

 private:
  // How output rows and columns become lanes: `bands` runs of columns a vector, of which `image_bands` are
  // parts of one image, each of `band_rows` rows.
  struct Cut {
    int32_t bands = 1, image_bands = 1;
    int64_t band_rows = 0, row_tiles = 0, columns = 0, sets = 0;
    double cost = 0;
  };
  static Cut choose(int64_t images, int64_t out_h, int64_t out_w);

  struct Place {
    int64_t set, row, column;  // row of the band, column of the image
    int32_t rows;
  };
  Place place(int64_t index) const {
    const int64_t column = index % cut_.columns, tile = index / cut_.columns % cut_.row_tiles;
    const int64_t begin = cut_.band_rows * tile / cut_.row_tiles,
                  end = cut_.band_rows * (tile + 1) / cut_.row_tiles;
    return {index / cut_.columns / cut_.row_tiles, begin, column * (kPanelGroup / cut_.bands),
            static_cast<int32_t>(end - begin)};
  }

  struct Band {
    int64_t image, row;
  };
  Band band_of(const Place& p, int32_t b) const {
    const int64_t n = p.set * cut_.bands + b;
    return {n / cut_.image_bands, n % cut_.image_bands * cut_.band_rows};
  }

  // Lines that some taps of a kernel column share: rows `begin` to `end` before the tile's, of one phase.
  struct Segment {
    int64_t phase, size, begin, end;
    int32_t line;
  };

  const Planes& planes_;
  int64_t images_, out_h_, out_w_;
  Cut cut_;
  std::vector<Segment> segments_;
  int32_t column_lines_ = 0, channel_lines_ = 0;  // of one kernel column, of all
  std::vector<uint16_t> tap_lines_;
};

}  // namespace pared
