#include "ref/conv.h"

namespace pared {

void conv2d_reference(const ConvReference& a) {
  const int64_t group_in = a.channels / a.groups, group_out = a.filters / a.groups;
  for (int64_t n = 0; n < a.images; ++n)
    for (int64_t f = 0; f < a.filters; ++f)
      for (int64_t oy = 0; oy < a.out_h; ++oy)
        for (int64_t ox = 0; ox < a.out_w; ++ox) {
          double sum = a.bias ? a.bias[f] : 0.0;
          for (int64_t c = 0; c < group_in; ++c)
            for (int64_t i = 0; i < a.kh; ++i)
              for (int64_t j = 0; j < a.kw; ++j) {
                const int64_t iy = oy * a.stride_h - a.pad_top + i * a.dilation_h;
                const int64_t ix = ox * a.stride_w - a.pad_left + j * a.dilation_w;
                if (iy < 0 || iy >= a.height || ix < 0 || ix >= a.width) continue;
                const double weight = a.w[((f * group_in + c) * a.kh + i) * a.kw + j];
                const int64_t channel = f / group_out * group_in + c;
                if (weight != 0.0)
                  sum += weight * a.x[((n * a.channels + channel) * a.height + iy) * a.width + ix];
              }
          a.y[((n * a.filters + f) * a.out_h + oy) * a.out_w + ox] = sum;
        }
}

}  // namespace pared
