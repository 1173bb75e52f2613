#include "formats/csr.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "core/aligned.h"
#include "core/check.h"
#include "core/parallel.h"
#include "formats/formats.h"
#include "formats/values.h"

namespace pared {
namespace {

constexpr int64_t kGroupsPerTask = 8;
constexpr int64_t kMaxNonZeros = int64_t{1} << 32;  // starts are 32 bits

// Calls fn(column, value) for each element of a row that may be stored. One loop for every source.
template <class F>
void for_row(const DenseView& w, int64_t row, F fn) {
  const int64_t base = row * w.row_stride;
  const int64_t first = row / (w.rows / w.groups) * w.cols;  // of the row's diagonal block
  for (int64_t c = 0; c < w.cols; ++c) {
    const float v = value_at(w.data, base + c * w.col_stride, w.dtype);
    if (v != 0.0f) fn(first + c, v);
  }
}

int64_t index_at(const void* p, int64_t i, DType t) {
  return t == DType::i32 ? static_cast<const int32_t*>(p)[i] : static_cast<const int64_t*>(p)[i];
}

template <class F>
void for_row(const CsrView& w, int64_t row, F fn) {
  const int64_t end = index_at(w.row_ptr, row + 1, w.index_type);
  for (int64_t i = index_at(w.row_ptr, row, w.index_type); i < end; ++i)
    fn(index_at(w.columns, i, w.index_type), value_at(w.values, i, w.dtype));
}

int64_t matrix_cols(const DenseView& w) { return w.cols * w.groups; }
int64_t matrix_cols(const CsrView& w) { return w.cols; }

// Calls fn(column, values) for each entry of a slot, columns ascending. `scratch` is the caller's, empty at
// first.
template <class View, class F>
void for_entries(const View& w, int64_t slot, int entry_rows, std::vector<float>& scratch, F fn) {
  if (entry_rows == 1) {
    if (slot < w.rows)
      for_row(w, slot, [&](int64_t c, float v) {
        if (is_stored(v)) fn(c, &v);
      });
    return;
  }
  // The rows of a quad meet in a dense strip, which is left zero for the next.
  scratch.resize(matrix_cols(w) * entry_rows);
  int64_t first = matrix_cols(w), end = 0;
  for (int r = 0; r < entry_rows && slot * entry_rows + r < w.rows; ++r)
    for_row(w, slot * entry_rows + r, [&](int64_t c, float v) {
      if (!is_stored(v)) return;
      scratch[c * entry_rows + r] = v;
      first = std::min(first, c);
      end = std::max(end, c + 1);
    });
  for (int64_t c = first; c < end; ++c) {
    float* values = &scratch[c * entry_rows];
    if (std::all_of(values, values + entry_rows, [](float v) { return v == 0.0f; })) continue;
    fn(c, values);
    std::fill_n(values, entry_rows, 0.0f);
  }
}

void check_structure(const DenseView&) {}

void check_structure(const CsrView& w) {
  PARED_CHECK(index_at(w.row_ptr, 0, w.index_type) == 0, "crow_indices: expected to start at 0");
  const int64_t nnz = index_at(w.row_ptr, w.rows, w.index_type);
  for (int64_t r = 0; r < w.rows; ++r) {
    const int64_t b = index_at(w.row_ptr, r, w.index_type), e = index_at(w.row_ptr, r + 1, w.index_type);
    PARED_CHECK(b <= e && e <= nnz, "crow_indices: expected a non-decreasing sequence up to ", nnz, ", got ",
                b, " then ", e, " at row ", r);
    int64_t previous = -1;
    for (int64_t i = b; i < e; ++i) {
      const int64_t c = index_at(w.columns, i, w.index_type);
      PARED_CHECK(c > previous && c < w.cols, "col_indices: expected ascending unique columns below ", w.cols,
                  " in each row, got ", c, " after ", previous, " in row ", r);
      previous = c;
    }
  }
}

// Tile and K block by density. The panel block (tile * block_k floats) should fit L1 beside the accumulators
// and the stream of weights: 40 KB while rows are dense. Below about ten non-zeros a row and block the
// accumulators' load and store and the mispredicted end of the inner loop cost more than a panel that comes
// half from L2, so the block gets deeper; a very sparse weight also needs the depth for its size (one count
// byte a row and block). Bound: tile * block_k * 4 <= 65536, the reach of a 16-bit offset; block_k <= 255.
// Measured on Zen 5, 384 tokens, speed-up over dense at 50/80/90/95 %: {128, 80} 2.6/5.4/8.1/10.8,
// {128, 128} 2.2/5.0/8.4/12.2, {64, 240} 2.2/5.0/8.5/12.8, {96, 96} 2.5/5.0/7.4/9.6.
struct Tiling {
  uint32_t tile, block_k;
};
Tiling choose_tiling(int64_t rows, int64_t cols, int64_t nnz, int entry_rows) {
  // Four rows of sums, six vectors and a broadcast fill the registers at 96 positions.
  if (entry_rows == kQuadRows) return {96, 96};
  const double cells = static_cast<double>(rows) * static_cast<double>(cols);
  const double density = cells > 0 ? static_cast<double>(nnz) / cells : 1.0;
  if (density >= 0.14) return {128, 80};
  if (density >= 0.04) return {128, 128};
  return {64, 240};
}

template <class View>
CsrPlan make_plan(const View& w, const ConvShape& conv, PackedKind kind, int entry_rows) {
  PARED_CHECK(w.rows >= 0 && w.rows < kMaxSize && w.cols >= 0 && w.cols < kMaxSize,
              "weight: expected sizes from 0 to 2^48, got [", w.rows, ", ", w.cols, "]");
  check_structure(w);
  std::atomic<int64_t> nnz{0}, bad_row{-1};
  parallel_for(0, w.rows, 32, [&](int64_t r0, int64_t r1) {
    int64_t n = 0;
    for (int64_t r = r0; r < r1; ++r)
      for_row(w, r, [&](int64_t, float v) {
        n += is_stored(v);
        if (!std::isfinite(v)) bad_row.store(r, std::memory_order_relaxed);
      });
    nnz.fetch_add(n, std::memory_order_relaxed);
  });
  PARED_CHECK(bad_row.load() < 0, "weight: expected finite values, got NaN or infinity in row ",
              bad_row.load());
  PARED_CHECK(nnz.load() < kMaxNonZeros, "weight: expected fewer than 2^32 non-zeros, got ", nnz.load());

  const int64_t cols = matrix_cols(w);
  const Tiling tiling = choose_tiling(w.rows, cols, nnz.load(), entry_rows);
  CsrPlan plan{};
  PackedHeader& h = plan.header;
  h = new_header(kind, w.dtype, w.rows, cols);
  h.entry_rows = static_cast<uint8_t>(entry_rows);
  h.nnz = nnz.load();
  h.channels = conv.channels;
  h.kh = conv.kh;
  h.kw = conv.kw;
  h.groups = conv.groups;
  h.tile = tiling.tile;
  h.block_k = tiling.block_k;

  const int64_t groups = (w.rows + kCsrGroup - 1) / kCsrGroup;
  const int64_t blocks = (cols + h.block_k - 1) / h.block_k;
  const int slots = kCsrGroup / entry_rows;
  plan.counts.assign(groups * blocks * slots, 0);
  plan.starts.assign(groups * (blocks + 1), 0);
  parallel_for(0, groups, kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    std::vector<float> scratch;
    for (int64_t s = g0 * slots; s < g1 * slots; ++s) {
      uint8_t* counts = plan.counts.data() + (s / slots * blocks * slots + s % slots);
      for_entries(w, s, entry_rows, scratch,
                  [&](int64_t c, const float*) { ++counts[c / h.block_k * slots]; });
    }
  });
  int64_t at = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t b = 0; b <= blocks; ++b) {
      plan.starts[g * (blocks + 1) + b] = static_cast<uint32_t>(at);
      if (b < blocks)
        for (int s = 0; s < slots; ++s) at += plan.counts[(g * blocks + b) * slots + s];
    }
  h.entries = at;

  size_t end = sizeof(PackedHeader);
  const auto section = [&end](size_t bytes) {
    const size_t begin = round_up(end, kCacheLine);
    end = begin + bytes;
    return begin;
  };
  h.starts_at = section(plan.starts.size() * sizeof(uint32_t));
  h.counts_at = section(plan.counts.size());
  h.values_at = section(h.entries * entry_rows * sizeof(float));
  h.offsets_at = section(h.entries * sizeof(uint16_t));
  h.bytes = round_up(end, kCacheLine);
  return plan;
}

template <class View>
void write(const View& w, const CsrPlan& plan, uint8_t* out) {
  const PackedHeader& h = plan.header;
  std::memset(out, 0, h.values_at);
  // Not memcpy: an empty vector's data may be null.
  std::copy(plan.starts.begin(), plan.starts.end(), reinterpret_cast<uint32_t*>(out + h.starts_at));
  std::copy(plan.counts.begin(), plan.counts.end(), out + h.counts_at);
  float* values = reinterpret_cast<float*>(out + h.values_at);
  uint16_t* offsets = reinterpret_cast<uint16_t*>(out + h.offsets_at);
  // Padding between and behind the sections is part of the checksum.
  const int64_t value_count = h.entries * h.entry_rows;
  std::memset(values + value_count, 0, h.offsets_at - (h.values_at + value_count * sizeof(float)));
  std::memset(offsets + h.entries, 0, h.bytes - (h.offsets_at + h.entries * sizeof(uint16_t)));

  const int64_t groups = (w.rows + kCsrGroup - 1) / kCsrGroup;
  const int64_t blocks = (h.cols + h.block_k - 1) / h.block_k;
  parallel_for(0, groups, kGroupsPerTask, [&](int64_t g0, int64_t g1) {
    std::vector<uint32_t> at(blocks);
    std::vector<float> scratch;
    for (int64_t g = g0; g < g1; ++g) {
      std::copy_n(&plan.starts[g * (blocks + 1)], blocks, at.begin());
      const int slots = kCsrGroup / h.entry_rows;
      for (int64_t s = g * slots; s < (g + 1) * slots; ++s)
        for_entries(w, s, h.entry_rows, scratch, [&](int64_t c, const float* v) {
          const int64_t b = c / h.block_k, i = at[b]++;
          std::copy_n(v, h.entry_rows, values + i * h.entry_rows);
          offsets[i] = static_cast<uint16_t>((c - b * h.block_k) * h.tile * sizeof(float));
        });
    }
  });
  seal(h, out);
}

}  // namespace

CsrPlan plan_csr(const DenseView& w, const ConvShape& conv, PackedKind kind, int entry_rows) {
  return make_plan(w, conv, kind, entry_rows);
}
CsrPlan plan_csr(const CsrView& w, const ConvShape& conv, PackedKind kind, int entry_rows) {
  return make_plan(w, conv, kind, entry_rows);
}
void pack_csr(const DenseView& w, const CsrPlan& plan, uint8_t* out) { write(w, plan, out); }
void pack_csr(const CsrView& w, const CsrPlan& plan, uint8_t* out) { write(w, plan, out); }

namespace {

// Whether `product` is the product of positive factors, without overflow.
bool is_product(int64_t product, std::initializer_list<int64_t> factors) {
  for (int64_t f : factors) {
    if (product % f != 0) return false;
    product /= f;
  }
  return product == 1;
}

}  // namespace

CsrPacked view_csr(const uint8_t* data, int64_t bytes) {
  const PackedHeader* h = &checked_header(data, bytes);
  PARED_CHECK(h->kind == PackedKind::csr || h->kind == PackedKind::bsr || h->kind == PackedKind::dense,
              "packed weight: expected CSR, BSR or dense, got kind ", static_cast<int>(h->kind));
  PARED_CHECK(h->nnz >= 0 && h->nnz < kMaxNonZeros && h->block_k > 0 && h->block_k <= 255 &&
                  (h->tile == 64 || h->tile == 96 || h->tile == 128) &&
                  (h->entry_rows == 1 || h->entry_rows == kQuadRows) && h->entries >= 0 &&
                  h->entries < kMaxNonZeros && h->block_k * h->tile * 4 <= kMaxOffset + 1,
              "packed weight: expected a valid header, got a corrupt one");
  const bool linear = h->channels == 0 && h->kh == 0 && h->kw == 0 && h->groups == 0;
  PARED_CHECK(
      linear || (h->channels > 0 && h->kh > 0 && h->kw > 0 && h->groups > 0 && h->rows % h->groups == 0 &&
                 is_product(h->cols, {h->channels, h->kh, h->kw, h->groups})),
      "packed weight: expected a consistent convolution shape, got a corrupt header");
  CsrPacked w;
  w.header = h;
  const int64_t groups = w.groups(), blocks = w.blocks();
  // First by division: the products below cannot overflow then.
  PARED_CHECK(groups == 0 || blocks < bytes / groups,
              "packed weight: expected a buffer of the size of its matrix, got a corrupt header");
  check_section(*h, h->starts_at, groups * (blocks + 1) * sizeof(uint32_t));
  check_section(*h, h->counts_at, groups * blocks * w.slots());
  check_section(*h, h->values_at, h->entries * h->entry_rows * sizeof(float));
  check_section(*h, h->offsets_at, h->entries * sizeof(uint16_t));
  w.starts = reinterpret_cast<const uint32_t*>(data + h->starts_at);
  w.counts = data + h->counts_at;
  w.values = reinterpret_cast<const float*>(data + h->values_at);
  w.offsets = reinterpret_cast<const uint16_t*>(data + h->offsets_at);
  return w;
}

void validate_csr(const CsrPacked& w) {
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
      for (int s = 0; s < slots; ++s) {
        const int count = w.counts[(g * blocks + b) * slots + s];
        const int64_t row = g * kCsrGroup + s * R;
        PARED_CHECK(at + count <= static_cast<uint64_t>(h.entries) && (count == 0 || row < h.rows),
                    "packed weight: row group ", g, ": counts exceed the matrix");
        int64_t previous = -1;
        for (int i = 0; i < count; ++i, ++at) {
          const int64_t unit = w.offsets[at] / (h.tile * sizeof(float));
          PARED_CHECK(w.offsets[at] % (h.tile * sizeof(float)) == 0 && unit > previous &&
                          b * h.block_k + unit < h.cols,
                      "packed weight: row ", row, ": invalid column offset ", w.offsets[at]);
          previous = unit;
          int stored = 0;
          for (int r = 0; r < R; ++r) {
            const float v = w.values[at * R + r];
            PARED_CHECK((v == 0.0f || (is_stored(v) && row + r < h.rows)) && std::isfinite(v),
                        "packed weight: row ", row + r, ": invalid value ", v);
            stored += v != 0.0f;
          }
          PARED_CHECK(stored > 0, "packed weight: row ", row, ": invalid value, an entry of zeros alone");
          nnz += stored;
        }
      }
    }
  PARED_CHECK(at == static_cast<uint64_t>(h.entries) && nnz == h.nnz, "packed weight: expected ", h.nnz,
              " non-zeros, got ", nnz);
}

namespace {

// Calls fn(row, column, value) for every non-zero, row by row, columns ascending.
template <class F>
void for_each(const CsrPacked& w, F fn) {
  const PackedHeader& h = *w.header;
  const int64_t groups = w.groups(), blocks = w.blocks();
  const int slots = w.slots(), R = h.entry_rows;
  std::vector<uint64_t> at(blocks);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t b = 0; b < blocks; ++b) at[b] = w.starts[g * (blocks + 1) + b];
    for (int s = 0; s < slots; ++s) {
      for (int r = 0; r < R && g * kCsrGroup + s * R + r < h.rows; ++r)
        for (int64_t b = 0; b < blocks; ++b)
          for (uint64_t i = at[b]; i < at[b] + w.counts[(g * blocks + b) * slots + s]; ++i)
            if (const float v = w.values[i * R + r]; v != 0.0f)
              fn(g * kCsrGroup + s * R + r, b * h.block_k + w.offsets[i] / (h.tile * sizeof(float)), v);
      for (int64_t b = 0; b < blocks; ++b) at[b] += w.counts[(g * blocks + b) * slots + s];
    }
  }
}

}  // namespace

void unpack_csr(const CsrPacked& w, int64_t* row_ptr, int64_t* columns, float* values) {
  validate_csr(w);  // it writes where the contents say
  int64_t n = 0, row = 0;
  row_ptr[0] = 0;
  for_each(w, [&](int64_t r, int64_t c, float v) {
    while (row < r) row_ptr[++row] = n;
    columns[n] = c;
    values[n++] = v;
  });
  while (row < w.header->rows) row_ptr[++row] = n;
}

void unpack_csr_dense(const CsrPacked& w, DType dtype, void* out) {
  validate_csr(w);
  const int64_t cols = dense_cols(*w.header);
  std::fill_n(static_cast<uint8_t*>(out), w.header->rows * cols * dtype_size(dtype), uint8_t{0});
  for_each(w, [&](int64_t r, int64_t c, float v) {
    const int64_t i = r * cols + c % cols;
    if (dtype == DType::f32) {
      static_cast<float*>(out)[i] = v;
    } else {
      static_cast<uint16_t*>(out)[i] = dtype == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
    }
  });
}

}  // namespace pared
