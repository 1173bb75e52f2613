// Selection on the device: the k-th largest key of many tensors, masks of the k largest, by row, by group and
// by block too. The same order as ops/topk.h: keys are int32 that compare as the numbers, ties go to the
// lowest index, NaN ranks lowest.
//
// select_threshold is six launches at most, whatever the data, and no wait: a sample brackets the rank (1),
// one pass over the data counts what is above the bracket and gathers the few keys inside (2), and up to
// three passes of 11 bits select among these (3-5). Keys equal to an end of the bracket are counted and not
// gathered where the sample saw many. If the bracket missed or too much was inside, the three passes read the
// data instead; a device flag decides, so that a CUDA graph can hold all of it. Magnitudes of 16 bits are
// counted one by one (2), and if the bracket missed once more (3).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "cuda/select_plan.h"
#include "kernels/select_types.h"

namespace pared::cuda {

// One contiguous tensor of a selection, on the device. Elements are numbered over all members in order.
struct SelectMember {
  const void* w;
  int64_t n;
  DType dtype;  // f32, f16 or bf16
  SelectKey key;
  const void* g = nullptr;     // of SelectKey::product: [n], or [period], repeated
  int64_t period = 0;          // 0: g is [n]
  DType g_dtype = DType::f32;  // f32, or dtype
  uint8_t* mask = nullptr;     // n bytes, for the masks
};

// On the device. `counts` is {above, ties, equal, nans}: see Threshold in ops/topk.h.
struct SelectResult {
  float* value;
  int64_t* counts;
};

// Finds the k-th key, 1 <= k <= elements. The workspace has plan.bytes bytes, aligned to 256, of any content;
// it keeps what the next functions read. Enqueues and returns.
void select_threshold(const std::vector<SelectMember>& members, const SelectPlan& plan, int64_t k,
                      void* workspace, const SelectResult& result, int device, cudaStream_t stream);

// After select_threshold with the same workspace: each member's mask, exactly k of them 1.
void select_mask(const SelectPlan& plan, void* workspace, int device, cudaStream_t stream);

// After select_mask, of one member: keys and indices [k] of the selected, in order of the index.
void select_compact(const SelectPlan& plan, void* workspace, int32_t* keys, int64_t* indices, int device,
                    cudaStream_t stream);

// A matrix whose rows may be apart; sizes and strides in elements, cols below 2^31.
struct SelectMatrix {
  const void* w;
  int64_t rows, cols, stride;
  DType dtype;
  SelectKey key;
  const void* g;     // row r starts at g + r * g_stride
  int64_t g_stride;  // 0: one row for all
  DType g_dtype;
};

// Exactly k (or all there are) of every group; mask is [rows, cols]. The columns of a row are channels *
// taps, the channel outermost; a group is `group` consecutive channels at one tap, the last one may be short.
// With group = cols and one tap: of every row. Adds the NaNs to *nans, if given.
struct SelectGroupsArgs {
  SelectMatrix x;
  int64_t k, group, taps;
  uint8_t* mask;
  int64_t* nans;
};
void select_mask_groups(const SelectGroupsArgs& args, int device, cudaStream_t stream);

// Blocks of r rows by c consecutive channels at one tap, as BlockShape of ops/topk.h.
struct SelectBlocks {
  int64_t r, c, taps;
};
// scores [ceil(rows / r)][taps][ceil(channels / c)]: the sums of the elements' scores down the rows, then
// over the channels, in float32, in that order.
void select_block_scores(const SelectMatrix& x, const SelectBlocks& blocks, float* scores, int device,
                         cudaStream_t stream);
// From a mask of the blocks to one of the elements, [rows, cols].
void select_expand_blocks(int64_t rows, int64_t cols, const SelectBlocks& blocks, const uint8_t* chosen,
                          uint8_t* mask, int device, cudaStream_t stream);

// Whether this build has code that the current device can run: cudaErrorNoKernelImageForDevice if not.
cudaError_t kernel_image_status();

}  // namespace pared::cuda
