// Packs a dense weight for few tokens, a warp a block of 64 x 64: how large each block becomes, then, once
// the caller has added that up, what is in it. decode_plan.h has the layout.
#include "cuda/decode.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace pared::cuda {
namespace {

constexpr int kWarps = 4, kRun = 16;  // consecutive columns of a lane

// The 16 consecutive values of one output that a lane holds, as bits; zero where they are beyond the matrix,
// masked out, or zero (-0.0 is).
template <class Value>
struct Run {
  Value at[kRun];

  __device__ Run(const DecodeDense& w, int64_t output, int64_t column) {
    const auto* from = static_cast<const Value*>(w.values) + output * w.stride + column;
    constexpr int kLoads = kRun * sizeof(Value) / 16;
    if (output < w.outputs && column + kRun <= w.cols && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      uint4 loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) loaded[i] = ptx::load_once(reinterpret_cast<const uint4*>(from) + i);
      memcpy(at, loaded, sizeof(at));
    } else {
#pragma unroll
      for (int c = 0; c < kRun; ++c) at[c] = output < w.outputs && column + c < w.cols ? from[c] : Value{0};
    }
    if (w.mask && output < w.outputs) {
      const uint8_t* keep = w.mask + output * w.cols + column;
#pragma unroll
      for (int c = 0; c < kRun; ++c)
        if (column + c < w.cols && !keep[c]) at[c] = 0;
    }
    if (sizeof(Value) == 2) {
#pragma unroll
      for (int c = 0; c < kRun; ++c)
        if ((at[c] & 0x7fff) == 0) at[c] = 0;
    }
  }
};

// Value j of register i of fragment s is column 4 s + 2 (i / 2) + j of the run of output g + 8 (i % 2).
__device__ constexpr int column_of(int s, int i, int j) { return 4 * s + 2 * (i / 2) + j; }

// This warp's block, or no block: the last warps of a grid.
struct Place {
  int64_t block, output, column;  // of the lane's first run in fragments of r = 0
  bool valid;

  __device__ explicit Place(const DecodeDense& w) {
    const int64_t across = (w.cols + kDecodeBlock - 1) / kDecodeBlock,
                  down = (w.outputs + kDecodeBlock - 1) / kDecodeBlock;
    block = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    valid = block < across * down;
    output = block / across * kDecodeBlock + ptx::lane() / 4;
    column = block % across * kDecodeBlock + ptx::lane() % 4 * kRun;
  }
};

// units[block]: its size in 16 bytes; *largest: the greatest of them. kPairs: of pairs16.
template <class Value, bool kPairs>
__global__ void __launch_bounds__(kWarps * 32)
    pack_sizes_kernel(const DecodeDense w, int64_t* units, unsigned long long* largest) {
  const Place at(w);
  if (!at.valid) return;
  int count = 0;
#pragma unroll
  for (int row = 0; row < kDecodeBlock; row += 8) {
    const Run<Value> run(w, at.output + row, at.column);
#pragma unroll
    for (int c = 0; c < kRun; c += kPairs ? 2 : 1) count += run.at[c] != 0 || (kPairs && run.at[c + 1] != 0);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) count += __shfl_xor_sync(0xffffffffu, count, d);
  if (ptx::lane() != 0) return;
  constexpr int kHeader = kPairs ? kDecodePairHeaderBytes : kDecodeHeaderBytes<sizeof(Value)>;
  const int64_t size = (kHeader + count * static_cast<int>(sizeof(Value)) * (kPairs ? 2 : 1) + 15) / 16;
  units[at.block] = size;
  atomicMax(largest, static_cast<unsigned long long>(size));
}

template <class Value>
__global__ void __launch_bounds__(kWarps * 32)
    pack_bitmap_kernel(const DecodeDense w, const uint32_t* offsets, uint8_t* blocks) {
  const Place at(w);
  if (!at.valid) return;
  const int lane = ptx::lane();
  uint8_t* const block = blocks + int64_t{offsets[at.block]} * 16;
  auto* const starts = reinterpret_cast<uint16_t*>(block + kDecodeMaskBytes);
  auto* const values = reinterpret_cast<Value*>(block + kDecodeHeaderBytes<sizeof(Value)>);
  constexpr int kParts = kDecodeParts<sizeof(Value)>;
  uint32_t masks[4], first = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const Run<Value> low(w, at.output + 16 * r, at.column), high(w, at.output + 16 * r + 8, at.column);
    uint32_t bits = 0, counts[kParts] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        const uint32_t present = (b / 2 % 2 ? high : low).at[column_of(s, b / 2, b % 2)] != 0;
        bits |= present << (s / 2 * 16 + b % 2 * 8 + s % 2 * 4 + b / 2);
        counts[b * kParts / 8] += present << (8 * s);
      }
    masks[r] = bits;
    // Where the lane's values begin in each part of each fragment: as decode.cu's expand finds them.
    uint32_t before[kParts], last[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      before[part] = counts[part];
#pragma unroll
      for (int d = 1; d < 32; d *= 2) before[part] = ptx::add_from_left(before[part], d);
      before[part] -= counts[part];
      last[part] = __shfl_sync(0xffffffffu, before[part], 31);
      counts[part] = __shfl_sync(0xffffffffu, counts[part], 31);
    }
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (lane == 0) starts[(4 * r + s) * kParts + part] = static_cast<uint16_t>(first * sizeof(Value));
        Value* to = values + first + (before[part] >> (8 * s) & 0xff);
#pragma unroll
        for (int b = 8 / kParts * part; b < 8 / kParts * (part + 1); ++b) {
          const Value v = (b / 2 % 2 ? high : low).at[column_of(s, b / 2, b % 2)];
          if (v != 0) *to++ = v;
        }
        first += (last[part] >> (8 * s) & 0xff) + (counts[part] >> (8 * s) & 0xff);
      }
  }
  reinterpret_cast<uint4*>(block)[lane] = make_uint4(masks[0], masks[1], masks[2], masks[3]);
  constexpr uint32_t kUnit = 16 / sizeof(Value);
  for (uint32_t i = first + lane; i < (first + kUnit - 1) / kUnit * kUnit; i += 32) values[i] = 0;
}

__global__ void __launch_bounds__(kWarps * 32)
    pack_pairs_kernel(const DecodeDense w, const uint32_t* offsets, uint8_t* blocks) {
  const Place at(w);
  if (!at.valid) return;
  const int lane = ptx::lane();
  uint8_t* const block = blocks + int64_t{offsets[at.block]} * 16;
  auto* const starts = reinterpret_cast<uint16_t*>(block + kDecodePairMaskBytes);
  auto* const pairs = reinterpret_cast<uint32_t*>(block + kDecodePairHeaderBytes);
  uint32_t masks[2] = {}, first = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const Run<uint16_t> low(w, at.output + 16 * r, at.column), high(w, at.output + 16 * r + 8, at.column);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t registers[4], count = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Run<uint16_t>& run = i % 2 ? high : low;
        registers[i] = run.at[column_of(s, i, 0)] | uint32_t{run.at[column_of(s, i, 1)]} << 16;
        masks[r / 2] |= uint32_t{registers[i] != 0} << (16 * (r % 2) + 4 * s + i);
        count += registers[i] != 0;
      }
      uint32_t before = count;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) before = ptx::add_from_left(before, d);
      if (lane == 0) starts[4 * r + s] = static_cast<uint16_t>(first * 4);
      uint32_t* to = pairs + first + before - count;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (registers[i] != 0) *to++ = registers[i];
      first += __shfl_sync(0xffffffffu, before, 31);
    }
  }
  reinterpret_cast<uint2*>(block)[lane] = make_uint2(masks[0], masks[1]);
  for (uint32_t i = first + lane; i < (first + 3) / 4 * 4; i += 32) pairs[i] = 0;
}

__global__ void __launch_bounds__(kWarps * 32) pack_dense8_kernel(const DecodeDense w, uint8_t* blocks) {
  const Place at(w);
  if (!at.valid) return;
  auto* const to = reinterpret_cast<uint4*>(blocks + at.block * kDecodeBlock * kDecodeBlock) + ptx::lane();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const Run<uint8_t> low(w, at.output + 16 * r, at.column), high(w, at.output + 16 * r + 8, at.column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4] = {};
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const uint32_t v = (n / 2 % 2 ? high : low).at[column_of(2 * half + n / 8, n % 8 / 2, n % 2)];
        words[n / 4] |= v << (n % 4 * 8);
      }
      to[(r * 2 + half) * 32] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

LaunchPlan grid(const DecodeDense& w) {
  const int64_t across = (w.cols + kDecodeBlock - 1) / kDecodeBlock,
                down = (w.outputs + kDecodeBlock - 1) / kDecodeBlock;
  return {static_cast<unsigned>((across * down + kWarps - 1) / kWarps), kWarps * 32};
}

}  // namespace

void decode_pack_sizes(const DecodeDense& w, int64_t* units, int64_t* largest, int device,
                       cudaStream_t stream) {
  if (w.outputs == 0 || w.cols == 0) return;
  const DeviceGuard guard(device, "decode_pack_sizes");
  auto* const most = reinterpret_cast<unsigned long long*>(largest);
  switch (w.format) {
    case DecodeFormat::bitmap16:
      return launch("pack_sizes16", pack_sizes_kernel<uint16_t, false>, grid(w), stream, w, units, most);
    case DecodeFormat::pairs16:
      return launch("pack_sizes_pairs", pack_sizes_kernel<uint16_t, true>, grid(w), stream, w, units, most);
    default: return launch("pack_sizes8", pack_sizes_kernel<uint8_t, false>, grid(w), stream, w, units, most);
  }
}

void decode_pack(const DecodeDense& w, const uint32_t* offsets, uint8_t* blocks, int device,
                 cudaStream_t stream) {
  if (w.outputs == 0 || w.cols == 0) return;
  const DeviceGuard guard(device, "decode_pack");
  switch (w.format) {
    case DecodeFormat::bitmap16:
      return launch("pack_bitmap16", pack_bitmap_kernel<uint16_t>, grid(w), stream, w, offsets, blocks);
    case DecodeFormat::pairs16:
      return launch("pack_pairs16", pack_pairs_kernel, grid(w), stream, w, offsets, blocks);
    case DecodeFormat::bitmap8:
      return launch("pack_bitmap8", pack_bitmap_kernel<uint8_t>, grid(w), stream, w, offsets, blocks);
    default: return launch("pack_dense8", pack_dense8_kernel, grid(w), stream, w, blocks);
  }
}

}  // namespace pared::cuda
