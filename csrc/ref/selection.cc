#include "ref/selection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace pared {

void selection_reference(const SelectionReference& a, bool given) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const float* keys = a.keys + r * a.cols;
    int64_t* order = a.order + r * a.cols;
    bool* mask = a.mask + r * a.cols;
    if (!given) {
      std::iota(order, order + a.cols, int64_t{0});
      std::stable_sort(order, order + a.cols, [&](int64_t i, int64_t j) {
        return keys[i] > keys[j] || (std::isnan(keys[j]) && !std::isnan(keys[i]));
      });
    }
    std::fill_n(mask, a.cols, false);
    for (int64_t i = 0; i < a.k; ++i) mask[order[i]] = true;
    a.value[r] = a.k > 0 ? keys[order[a.k - 1]] : std::numeric_limits<float>::infinity();
    a.above[r] = 0;
    for (int64_t i = 0; i < a.k; ++i)
      a.above[r] += std::isnan(a.value[r]) ? !std::isnan(keys[order[i]]) : keys[order[i]] > a.value[r];
    a.ties[r] = a.k - a.above[r];
  }
}

}  // namespace pared
