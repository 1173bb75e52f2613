#include "ref/attention.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

namespace pared {
namespace {

constexpr double kUnseen = -std::numeric_limits<double>::infinity();

// One query of one head; s and off have room for a value a key.
void attend(const AttentionReference& a, int64_t head, int64_t query, double* s, double* off) {
  const double* q = a.q + (head * a.queries + query) * a.features;
  double largest = -FLT_MAX, worst = 0, sum = 0;
  for (int64_t j = 0; j < a.keys; ++j) {
    const double* k = a.k + (head * a.keys + j) * a.features;
    double dot = 0, magnitude = 0;
    for (int64_t d = 0; d < a.features; ++d) {
      dot += q[d] * k[d];
      magnitude += std::fabs(q[d] * k[d]);
    }
    s[j] = a.scale * dot + (a.mask ? a.mask[(head * a.queries + query) * a.keys + j] : 0.0);
    if (a.causal && j > query) s[j] = kUnseen;
    off[j] = 0;
    if (std::isfinite(s[j]))
      off[j] = FLT_EPSILON * ((2.0 * a.features + 4) * std::fabs(a.scale) * magnitude + std::fabs(s[j]));
    largest = std::max(largest, s[j]);
  }
  for (int64_t j = 0; j < a.keys; ++j) {
    if (std::isfinite(s[j])) off[j] += 4 * FLT_EPSILON * std::fabs(s[j] - largest);
    worst = std::max(worst, off[j]);
    s[j] = std::exp(s[j] - largest);
    sum += s[j];
  }
  const int64_t at = (head * a.queries + query) * a.out_features;
  for (int64_t d = 0; d < a.out_features; ++d) {
    double y = 0, error = 0, all = 0;
    for (int64_t j = 0; j < a.keys && sum > 0; ++j) {
      const double v = a.v[(head * a.keys + j) * a.out_features + d];
      y += s[j] / sum * v;
      error += s[j] / sum * (off[j] + worst + (2.0 * a.keys + 24) * FLT_EPSILON) * std::fabs(v);
      all += std::fabs(v);
    }
    a.y[at + d] = y;
    a.error[at + d] = 1.1 * error + 1e-37 * (1 + all);
  }
}

}  // namespace

void attention_reference(const AttentionReference& a) {
  std::vector<double> s(a.keys), off(a.keys);
  for (int64_t head = 0; head < a.heads; ++head)
    for (int64_t query = 0; query < a.queries; ++query) attend(a, head, query, s.data(), off.data());
}

}  // namespace pared
