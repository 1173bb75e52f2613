// The layout that the panel kernels read, for float32 values and for 32-bit words of four int8: an entry is
// one reduction unit of one row, or of four consecutive rows that share it ("quads").
//
// Invariants (validate_panel checks them all; view_panel, on each call, the header alone):
//   rows are cut into groups of kCsrGroup, a group into slots of entry_rows rows, the reduction into K blocks
//   of block_k units;
//   starts[g * (blocks + 1) + b]: first entry of group g in block b; block `blocks` is the group's end;
//   runs[(g * blocks + b) * slots + i]: the slots of a group and block, each once, and their entries, whose
//     sum is the next start minus this one. The packer sorts them by length, so that a kernel's inner loops
//     end where the processor expects it;
//   values/offsets: group-major, then block, run, ascending unit; entry_rows values an entry, row by row;
//   offset = (unit % block_k) * tile * 4, at most kMaxOffset, so that even a corrupt one stays inside the
//   panel buffer; or, where the units are the taps of a convolution's kernel (UnitCode), channel << 8 | tap
//   with the channel counted from the K block's first, and blocks are whole channels;
//   a zero value only beside a non-zero of the same entry. What else a value has to be, a format says.
// Size: 2 bytes an entry and 4 a value, two bytes a slot and block, four bytes a group and block.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/aligned.h"
#include "core/check.h"
#include "core/parallel.h"
#include "formats/packed.h"
#include "kernels/types.h"

namespace pared {

inline constexpr int kCsrGroup = kPanelMaxSlots;
inline constexpr int kQuadRows = 4;
inline constexpr uint32_t kMaxOffset = 0xffff;
inline constexpr uint32_t kMaxBlock = 256;

// How a unit of a K block is written as a 16-bit offset. A larger convolution kernel reads one channel's
// elements through several taps, so where its units lie in a panel is known when the panel is laid out; any
// other unit lies at its place times the panel's stride.
struct UnitCode {
  int32_t taps = 0;  // of a channel; 0: units are not told apart
  uint32_t pitch;    // of a panel of full stride, bytes; taps == 0

  uint16_t encode(int64_t unit) const {
    return static_cast<uint16_t>(taps ? unit / taps << 8 | unit % taps : unit * pitch);
  }
  // -1: no unit's.
  int64_t decode(uint16_t offset) const {
    if (taps) return (offset & 0xff) < taps ? (offset >> 8) * taps + (offset & 0xff) : -1;
    return offset % pitch == 0 ? offset / pitch : -1;
  }
};

template <class T>
struct PanelPacked {
  using Value = T;
  const PackedHeader* header;
  int64_t units;  // of the reduction
  UnitCode code;
  const uint32_t* starts;
  const PanelRun* runs;
  const T* values;
  const uint16_t* offsets;

  int slots() const { return kCsrGroup / header->entry_rows; }
  int64_t groups() const { return (header->rows + kCsrGroup - 1) / kCsrGroup; }
  int64_t blocks() const { return (units + header->block_k - 1) / header->block_k; }
};

// The shape of a convolution weight behind the matrix; all zero for a linear one. A grouped convolution is a
// block-diagonal matrix: the rows of group g have non-zeros in its own columns alone, so the kernels need to
// know nothing of groups.
struct ConvShape {
  int32_t channels = 0;  // of the input, in one group
  int32_t kh = 0, kw = 0, groups = 0;
};

// A dense weight [rows, cols] as the user holds it. Strides in elements. A convolution weight is given with
// its trailing axes flattened, which the binding does for contiguous memory; cols is then one group's.
struct DenseView {
  const void* data;
  DType dtype;
  int64_t rows, cols, row_stride, col_stride;
  int64_t groups = 1;
};

// Two steps, so that the caller owns the memory: plan (counts, checks, layout), then write.
struct PanelPlan {
  PackedHeader header;
  std::vector<uint32_t> starts;
  std::vector<PanelRun> runs;
};

namespace panel_layout {

inline constexpr int64_t kGroupsPerTask = 8;
inline constexpr int64_t kMaxNonZeros = int64_t{1} << 32;  // starts are 32 bits

// Cuts a buffer into 64-byte aligned sections.
class Sections {
 public:
  explicit Sections(size_t end) : end_(end) {}
  size_t add(size_t bytes) {
    const size_t begin = round_up(end_, kCacheLine);
    end_ = begin + bytes;
    return begin;
  }
  size_t bytes() const { return round_up(end_, kCacheLine); }

 private:
  size_t end_;
};

// The first entry of each slot, of runs whose first begins at `start`.
inline void find_slots(const PanelRun* runs, int slots, uint64_t start, uint64_t* first) {
  for (int i = 0; i < slots; start += runs[i++].count) first[runs[i].slot] = start;
}

// Fills runs and starts of a plan whose header has rows, entry_rows, tile and block_k, and the header's
// entries, sections (from `sections` on) and bytes. new_entries() gives a task's object: its
// operator()(slot, fn) calls fn(unit, const T* values) for each entry of a slot, units ascending. A block_k
// of kMaxBlock is lowered where a run would have more entries than it can count.
template <class T, class NewEntries>
void plan_panel(PanelPlan& plan, int64_t units, Sections sections, const NewEntries& new_entries) {
  PackedHeader& h = plan.header;
  const int64_t groups = (h.rows + kCsrGroup - 1) / kCsrGroup;
  const int64_t blocks = (units + h.block_k - 1) / h.block_k;
  const int slots = kCsrGroup / h.entry_rows;
  plan.runs.assign(groups * blocks * slots, {});
  plan.starts.assign(groups * (blocks + 1), 0);
  std::atomic<bool> too_long{false};
  parallel_for(0, groups, kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    auto entries = new_entries();
    for (int64_t g = g0; g < g1; ++g) {
      PanelRun* runs = plan.runs.data() + g * blocks * slots;
      for (int s = 0; s < slots; ++s) {
        for (int64_t b = 0; b < blocks; ++b) runs[b * slots + s].slot = static_cast<uint8_t>(s);
        entries(g * slots + s, [&](int64_t unit, const T*) {
          if (++runs[unit / h.block_k * slots + s].count == 0)
            too_long.store(true, std::memory_order_relaxed);
        });
      }
      // Slots behind the last row stay where they are, behind those that a kernel is called for.
      const int64_t rows = std::min<int64_t>(kCsrGroup, h.rows - g * kCsrGroup);
      for (int64_t b = 0; b < blocks; ++b)
        std::stable_sort(runs + b * slots, runs + b * slots + (rows + h.entry_rows - 1) / h.entry_rows,
                         [](PanelRun a, PanelRun b) { return a.count < b.count; });
    }
  });
  if (too_long) {
    h.block_k = 240;
    return plan_panel<T>(plan, units, sections, new_entries);
  }
  int64_t at = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b <= blocks; ++b) {
      plan.starts[g * (blocks + 1) + b] = static_cast<uint32_t>(at);
      if (b < blocks)
        for (int i = 0; i < slots; ++i) at += plan.runs[(g * blocks + b) * slots + i].count;
    }
  PARED_CHECK(at < kMaxNonZeros, "weight: expected fewer than 2^32 stored entries, got ", at);
  h.entries = at;
  h.starts_at = sections.add(plan.starts.size() * sizeof(uint32_t));
  h.counts_at = sections.add(plan.runs.size() * sizeof(PanelRun));
  h.values_at = sections.add(h.entries * h.entry_rows * sizeof(T));
  h.offsets_at = sections.add(h.entries * sizeof(uint16_t));
  h.bytes = sections.bytes();
}

// Writes all sections of the plan, zeros between them. The header is not written: see seal().
template <class T, class NewEntries>
void write_panel(const PanelPlan& plan, int64_t units, const UnitCode& code, const NewEntries& new_entries,
                 uint8_t* out) {
  const PackedHeader& h = plan.header;
  std::memset(out, 0, h.values_at);
  // Not memcpy: an empty vector's data may be null.
  std::copy(plan.starts.begin(), plan.starts.end(), reinterpret_cast<uint32_t*>(out + h.starts_at));
  std::copy(plan.runs.begin(), plan.runs.end(), reinterpret_cast<PanelRun*>(out + h.counts_at));
  T* values = reinterpret_cast<T*>(out + h.values_at);
  uint16_t* offsets = reinterpret_cast<uint16_t*>(out + h.offsets_at);
  // Padding between and behind the sections is part of the checksum.
  const int64_t value_count = h.entries * h.entry_rows;
  std::memset(values + value_count, 0, h.offsets_at - (h.values_at + value_count * sizeof(T)));
  std::memset(offsets + h.entries, 0, h.bytes - (h.offsets_at + h.entries * sizeof(uint16_t)));

  const int64_t groups = (h.rows + kCsrGroup - 1) / kCsrGroup;
  const int64_t blocks = (units + h.block_k - 1) / h.block_k;
  const int slots = kCsrGroup / h.entry_rows;
  parallel_for(0, groups, kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    std::vector<uint64_t> at(blocks * slots);
    auto entries = new_entries();
    for (int64_t g = g0; g < g1; ++g) {
      for (int64_t b = 0; b < blocks; ++b)
        find_slots(&plan.runs[(g * blocks + b) * slots], slots, plan.starts[g * (blocks + 1) + b],
                   &at[b * slots]);
      for (int s = 0; s < slots; ++s)
        entries(g * slots + s, [&](int64_t unit, const T* v) {
          const int64_t b = unit / h.block_k, i = static_cast<int64_t>(at[b * slots + s]++);
          std::copy_n(v, h.entry_rows, values + i * h.entry_rows);
          offsets[i] = code.encode(unit - b * h.block_k);
        });
    }
  });
}

// Throws ValueError unless the header's sizes and sections fit the buffer.
template <class T>
PanelPacked<T> view_panel(const PackedHeader& h, int64_t units, const UnitCode& code) {
  PARED_CHECK(h.nnz >= 0 && h.block_k > 0 && h.block_k <= kMaxBlock &&
                  (h.tile == 64 || h.tile == 96 || h.tile == 128) &&
                  (h.entry_rows == 1 || h.entry_rows == kQuadRows) && h.entries >= 0 &&
                  h.entries < kMaxNonZeros &&
                  (code.taps ? h.block_k % code.taps == 0 : h.block_k * h.tile * 4 <= kMaxOffset + 1),
              "packed weight: expected a valid header, got a corrupt one");
  PanelPacked<T> w;
  w.header = &h;
  w.units = units;
  w.code = code;
  const int64_t groups = w.groups(), blocks = w.blocks(), bytes = static_cast<int64_t>(h.bytes);
  // First by division: the products below cannot overflow then.
  PARED_CHECK(groups == 0 || blocks < bytes / groups,
              "packed weight: expected a buffer of the size of its matrix, got a corrupt header");
  check_section(h, h.starts_at, groups * (blocks + 1) * sizeof(uint32_t));
  check_section(h, h.counts_at, groups * blocks * w.slots() * sizeof(PanelRun));
  check_section(h, h.values_at, h.entries * h.entry_rows * sizeof(T));
  check_section(h, h.offsets_at, h.entries * sizeof(uint16_t));
  const auto* data = reinterpret_cast<const uint8_t*>(&h);
  w.starts = reinterpret_cast<const uint32_t*>(data + h.starts_at);
  w.runs = reinterpret_cast<const PanelRun*>(data + h.counts_at);
  w.values = reinterpret_cast<const T*>(data + h.values_at);
  w.offsets = reinterpret_cast<const uint16_t*>(data + h.offsets_at);
  return w;
}

// Checks the checksum and every invariant of the layout. non_zeros(row, unit, value) gives the weights other
// than zero that a value holds, and throws where it is none of the format's.
template <class T, class NonZeros>
void validate_panel(const PanelPacked<T>& w, const NonZeros& non_zeros) {
  const PackedHeader& h = *w.header;
  check_sum(h);
  const int64_t groups = w.groups(), blocks = w.blocks();
  const int slots = w.slots(), R = h.entry_rows;
  uint64_t at = 0;
  int64_t nnz = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b <= blocks; ++b) {
      PARED_CHECK(w.starts[g * (blocks + 1) + b] == at, "packed weight: row group ", g, " block ", b,
                  ": expected start ", at, ", got ", w.starts[g * (blocks + 1) + b]);
      if (b == blocks) break;
      unsigned seen = 0;
      for (int s = 0; s < slots; ++s) {
        const auto [count, slot] = w.runs[(g * blocks + b) * slots + s];
        const int64_t row = g * kCsrGroup + slot * R;
        PARED_CHECK(slot < slots && (seen >> slot & 1) == 0, "packed weight: row group ", g,
                    ": expected each row once, got slot ", int{slot});
        seen |= 1u << slot;
        // Kernels are called for the rows that there are, and as many runs.
        PARED_CHECK(at + count <= static_cast<uint64_t>(h.entries) &&
                        (row < h.rows) == (g * kCsrGroup + s * R < h.rows) && (count == 0 || row < h.rows),
                    "packed weight: row group ", g, ": counts exceed the matrix");
        int64_t previous = -1;
        for (int i = 0; i < count; ++i, ++at) {
          const int64_t unit = w.code.decode(w.offsets[at]);
          PARED_CHECK(unit > previous && unit < h.block_k && b * h.block_k + unit < w.units,
                      "packed weight: row ", row, ": invalid column offset ", w.offsets[at]);
          previous = unit;
          int64_t stored = 0;
          for (int r = 0; r < R; ++r) {
            const T v = w.values[at * R + r];
            const int n = v == 0 ? 0 : non_zeros(row + r, b * h.block_k + unit, v);
            PARED_CHECK(n == 0 || row + r < h.rows, "packed weight: row ", row + r, ": invalid value ", v);
            stored += n;
          }
          PARED_CHECK(stored > 0, "packed weight: row ", row, ": invalid value, an entry of zeros alone");
          nnz += stored;
        }
      }
    }
  PARED_CHECK(at == static_cast<uint64_t>(h.entries) && nnz == h.nnz, "packed weight: expected ", h.nnz,
              " non-zeros, got ", nnz);
}

// Calls fn(row, unit, value) for every value other than zero, row by row, units ascending.
template <class T, class F>
void for_each_value(const PanelPacked<T>& w, F fn) {
  const PackedHeader& h = *w.header;
  const int64_t groups = w.groups(), blocks = w.blocks();
  const int slots = w.slots(), R = h.entry_rows;
  struct Range {
    uint64_t first, count;
  };
  std::vector<Range> at(blocks * slots);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < blocks; ++b) {
      uint64_t first = w.starts[g * (blocks + 1) + b];
      for (int i = 0; i < slots; ++i) {
        const auto [count, slot] = w.runs[(g * blocks + b) * slots + i];
        at[b * slots + slot] = {first, count};
        first += count;
      }
    }
    for (int s = 0; s < slots; ++s)
      for (int r = 0; r < R && g * kCsrGroup + s * R + r < h.rows; ++r)
        for (int64_t b = 0; b < blocks; ++b) {
          const auto [first, count] = at[b * slots + s];
          for (uint64_t i = first; i < first + count; ++i)
            if (const T v = w.values[i * R + r]; v != 0)
              fn(g * kCsrGroup + s * R + r, b * h.block_k + w.code.decode(w.offsets[i]), v);
        }
  }
}

}  // namespace panel_layout
}  // namespace pared
