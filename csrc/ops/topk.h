// Selection: the threshold of the k largest keys, and masks of them. No score tensor is made and nothing is
// sorted; the floor is one read of the data.
//
// select_threshold draws a sample, brackets rank k between two sampled keys, and makes one pass that counts
// what is above the bracket and gathers the few keys inside, among which it then selects exactly. Keys equal
// to a bracket end are counted, never gathered, so that a tensor of mostly zeros costs no more. When the
// counts show that the bracket missed (or gathered too much), a radix search of 11 bits a pass takes over.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "kernels/types.h"

namespace pared {

// What to do about NaN keys: raise a ValueError that names the argument, or rank them below every number.
struct NanRule {
  bool raise;
  const char* argument;
};

// One contiguous tensor of a selection. Elements are numbered over all members in order.
struct SelectMember {
  const void* w;
  int64_t n;
  DType dtype;
  SelectKey key;
  const void* g = nullptr;  // second factor: [n], or [period], repeated
  int64_t period = 0;       // 0: g is [n]
  DType g_dtype = DType::f32;
};

// How a threshold was found; tests assert that each way was taken.
enum class SelectPath : uint8_t { none, direct, bracket_end, bracket_inside, radix };
const char* select_path_name(SelectPath path);

struct Threshold {
  int32_t key = INT32_MAX;
  int64_t above = 0;  // keys strictly above
  int64_t ties = 0;   // equal keys that are selected: k - above
  int64_t equal = 0;  // equal keys that there are
  int64_t nans = 0;
  SelectPath path = SelectPath::none;
  int64_t gathered = 0;  // keys that the pass put aside
};
// The number that a key stands for; NaN and plus infinity at the ends.
float key_value(int32_t key);

// The k-th largest of all members' keys. Throws ValueError unless 0 <= k <= their number, and on NaN if
// `nan` says so. k == 0 gives a threshold of +infinity that selects nothing.
Threshold select_threshold(const std::vector<SelectMember>& members, int64_t k, const NanRule& nan);

// The same, and the mask of exactly k elements: masks[i] has members[i].n bytes, 0 or 1. Ties go to the
// lowest number. Nothing is written when it throws.
Threshold select_mask_global(const std::vector<SelectMember>& members, int64_t k, const NanRule& nan,
                             uint8_t* const* masks);

// A matrix of rows of contiguous elements.
struct SelectRows {
  const void* w;
  int64_t rows, cols, stride;  // elements
  DType dtype;
  SelectKey key;
  const void* g = nullptr;  // row r starts at g + r * g_stride
  int64_t g_stride = 0;     // elements; 0: one row of factors for all
  DType g_dtype = DType::f32;
};

// Exactly k of every row; mask is [rows, cols]. Ties to the lowest column.
void select_mask_rows(const SelectRows& m, int64_t k, const NanRule& nan, uint8_t* mask);

// The k largest by key, descending, equal keys in order of their index; values are the elements themselves.
void select_sorted(const SelectMember& m, int64_t k, const NanRule& nan, void* values, int64_t* indices);

// Of every m consecutive inputs the n largest. The columns of a row are channels * taps, the channel
// outermost; a group is m consecutive channels at one tap. A tail of r < m channels keeps min(n, r).
void select_mask_groups(const SelectRows& matrix, int64_t taps, int64_t n, int64_t m, const NanRule& nan,
                        uint8_t* mask);

// Scores of the blocks of `r` consecutive rows by `c` consecutive channels at one tap: the sum of the
// elements' scores down the rows, then over the channels, in float32, in that order; what lies outside the
// matrix adds nothing. scores is [ceil(rows / r)][taps][ceil(channels / c)].
struct BlockShape {
  int64_t r, c, taps;
};
int64_t block_count(const SelectRows& matrix, const BlockShape& block);
void block_scores(const SelectRows& matrix, const BlockShape& block, float* scores);
// From a mask of the blocks to one of the elements, [rows, cols].
void expand_block_mask(const SelectRows& matrix, const BlockShape& block, const uint8_t* blocks,
                       uint8_t* mask);

// The positions that a selection among n elements samples (for adversarial tests).
std::vector<int64_t> select_sample_positions(int64_t n);

}  // namespace pared
