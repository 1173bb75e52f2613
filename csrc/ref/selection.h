// The specification of selection: a stable sort. Every operation of ops/topk.h picks from this order: the top
// k are its first k; a mask marks them; a threshold is the key of the k-th; rows, groups of N:M and blocks
// are selections of their own.
#pragma once

#include <cstdint>

namespace pared {

struct SelectionReference {
  const float* keys;  // [rows, cols]
  int64_t rows, cols, k;
  // [rows, cols] each: the columns of a row by key descending, equal keys (-0 equals 0) by column ascending,
  // NaN last; and whether a column is among the first k.
  int64_t* order;
  bool* mask;
  // [rows] each: the key of the k-th column (infinity for k = 0), how many keys are above it (all that are no
  // NaN, where it is one), and how many of those equal to it are among the first k.
  float* value;
  int64_t* above;
  int64_t* ties;
};

// `given`: `order` holds the order already, which does not depend on k.
void selection_reference(const SelectionReference& a, bool given);

}  // namespace pared
