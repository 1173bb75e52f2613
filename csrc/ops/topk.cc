#include "ops/topk.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>

#include "core/check.h"
#include "core/float_mode.h"
#include "core/parallel.h"
#include "kernels/generic/half.h"
#include "ops/topk_keys.h"

namespace pared {
namespace {

// Elements a task, at least and at most; multiples of the widest step. Between two tasks a thread adds to
// what all share, and waits for its loads and stores: 4 % of a pass over memory at 128 KB of float32 a task.
// Smaller selections need tasks for all threads.
constexpr int64_t kMinChunk = 1 << 15, kMaxChunk = 1 << 17, kChunksPerThread = 32;
// Fewer elements than a thread's start is worth.
constexpr int64_t kMinChunksPerThread = 3;
// Below this the keys are written out and selected from directly.
constexpr int64_t kDirect = 1 << 15;
// Half-width of the bracket in standard deviations of the sample: it misses once in ten thousand selections,
// and then costs three more passes.
constexpr double kSigmas = 4.0;
// Keys that make up more than this share of the sample are counted, not gathered.
constexpr int64_t kHeavyShare = 128;

// A sample is clusters of keys that lie side by side, because the place is what costs: in a selection beyond
// the caches a walk through the page tables that misses, 100 ns, whether a line is read there or four. What
// the bracket gathers falls with the root of the number of keys.
struct SampleSize {
  int64_t cluster;
  int log_clusters;

  explicit SampleSize(int64_t n) {
    int log_n = 0;
    while (n >> (log_n + 1)) ++log_n;
    const int log_cluster = log_n >= 22 ? 6 : 4;
    cluster = int64_t{1} << log_cluster;
    log_clusters = std::clamp(2 * log_n / 3, 10, 22) - log_cluster;
  }
  int64_t clusters() const { return int64_t{1} << log_clusters; }
  int64_t keys() const { return clusters() * cluster; }
};

struct Chunk {
  int32_t member;
  int64_t begin, end;
};

// What a pass over the data found, in all and chunk by chunk.
struct ChunkCounts {
  int32_t above, at_hi, at_lo, inside;
  int64_t offset;  // of the gathered keys in the pool
};
struct Pass {
  std::vector<ChunkCounts> chunks;
  SelectCounts sum = {0, 0, 0, 0, 0};
  bool overflow = false;
};

// Calls fn(run) for the stretches of a member's [begin, end) over which the second factor is contiguous.
template <class F>
void for_runs(const SelectMember& m, int64_t begin, int64_t end, F fn) {
  const int64_t w_size = m.key == SelectKey::raw ? 4 : dtype_size(m.dtype), g_size = dtype_size(m.g_dtype);
  while (begin < end) {
    const int64_t at = m.period ? begin % m.period : begin;
    const int64_t n = m.period ? std::min(m.period - at, end - begin) : end - begin;
    fn(SelectRun{static_cast<const char*>(m.w) + begin * w_size,
                 m.g ? static_cast<const char*>(m.g) + at * g_size : nullptr, n, m.dtype, m.g_dtype, m.key});
    begin += n;
  }
}

class Selection {
 public:
  Selection(const std::vector<SelectMember>& members, const NanRule& nan)
      : members_(members), nan_(nan), kernels_(active_isa()) {
    starts_.reserve(members.size() + 1);
    for (const SelectMember& m : members) {
      starts_.push_back(total_);
      total_ += m.n;
    }
    starts_.push_back(total_);
    while (chunk_ < kMaxChunk && total_ / (2 * chunk_) >= kChunksPerThread * num_threads()) chunk_ *= 2;
    for (size_t i = 0; i < members.size(); ++i)
      for (int64_t b = 0; b < members[i].n; b += chunk_)
        chunks_.push_back({static_cast<int32_t>(i), b, std::min(members[i].n, b + chunk_)});
    parts_ =
        std::clamp<int64_t>(static_cast<int64_t>(chunks_.size()) / kMinChunksPerThread, 1, num_threads());
  }

  int64_t total() const { return total_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }
  const SelectKernels& kernels() const { return kernels_; }
  int64_t parts() const { return parts_; }

  Threshold find(int64_t k) {
    PARED_CHECK(k >= 0 && k <= total_, "k: expected 0 to ", total_, " (the number of elements), got ", k);
    Threshold t;
    if (k == 0) {
      // Nothing to find, but a NaN is refused whatever k is.
      if (nan_.raise) pass(INT32_MAX, INT32_MAX, false);
      check_nans(pass_.sum.nans);
    } else if (total_ <= kDirect) {
      t = direct(k);
    } else {
      t = sampled(k);
    }
    t.ties = k - t.above;
    return t;
  }

  // Calls fn(part, chunk index, ties), where ties is how many of the chunk's elements that equal the
  // threshold are selected: all of them, none, or at one place some.
  template <class F>
  void for_selected(const Threshold& t, F fn) {
    std::vector<int64_t> ties(chunks_.size(), std::numeric_limits<int64_t>::max());
    if (t.ties < t.equal) {
      count_equal(t, ties);
      int64_t left = t.ties;
      for (int64_t& c : ties) {
        c = std::min(c, left);
        left -= c;
      }
    }
    if (t.ties == 0) std::fill(ties.begin(), ties.end(), 0);
    for_chunks([&](int64_t part, int64_t c) { fn(part, c, ties[c]); });
  }

  // The mask of one chunk, into `mask`, and its keys' runs with it.
  void write_mask(const Threshold& t, const Chunk& c, int64_t ties, uint8_t* mask) const {
    for_runs(members_[c.member], c.begin, c.end, [&](const SelectRun& run) {
      ties -= kernels_.mask({run, t.key, ties, t.nans > 0, mask});
      mask += run.n;
    });
  }

  void write_keys(const Chunk& c, int32_t* keys) const {
    for_runs(members_[c.member], c.begin, c.end, [&](const SelectRun& run) {
      kernels_.keys(run, keys);
      keys += run.n;
    });
  }

  // Calls fn(part, chunk index) for all chunks, on all threads. A part goes through chunks that follow each
  // other, as the kernels' prefetches expect, and helps the other parts when it is done.
  template <class F>
  void for_chunks(F fn) const {
    parallel_items(static_cast<int64_t>(chunks_.size()), parts_, [&](int64_t part, Items items) {
      const IeeeDenormals mode;
      for (int64_t c; (c = items.next()) >= 0;) fn(part, c);
    });
  }

 private:
  void check_nans(int64_t nans) const {
    PARED_CHECK(!nan_.raise || nans == 0, nan_.argument, ": expected no NaN among the keys, got ", nans,
                " (nan=\"lowest\" ranks them below every number)");
  }

  static int32_t* chunk_keys() {
    thread_local Scratch memory;
    return memory.get<int32_t>(kMaxChunk + kSelectPad);
  }

  // One read of the data: counts against the bracket, and gathers what lies inside into the pool.
  void pass(int32_t lo, int32_t hi, bool ends) {
    Pass p;
    lo_ = lo;
    hi_ = hi;
    p.chunks.resize(chunks_.size());
    std::atomic<int64_t> used{0}, nans{0};
    for_chunks([&](int64_t, int64_t index) {
      const Chunk& c = chunks_[index];
      int32_t* const keys = chunk_keys();
      SelectCounts n = {0, 0, 0, 0, 0};
      for_runs(members_[c.member], c.begin, c.end, [&](const SelectRun& run) {
        const SelectCounts r = kernels_.bracket({run, lo, hi, ends, keys + n.inside});
        n = {n.above + r.above, n.at_hi + r.at_hi, n.at_lo + r.at_lo, n.inside + r.inside, n.nans + r.nans};
      });
      const int64_t at = used.fetch_add(n.inside, std::memory_order_relaxed);
      if (n.inside && at + n.inside <= capacity_) std::memcpy(pool_ + at, keys, n.inside * sizeof(int32_t));
      if (n.nans) nans.fetch_add(n.nans, std::memory_order_relaxed);
      p.chunks[index] = {static_cast<int32_t>(n.above), static_cast<int32_t>(n.at_hi),
                         static_cast<int32_t>(n.at_lo), static_cast<int32_t>(n.inside), at};
    });
    for (const ChunkCounts& c : p.chunks) {
      p.sum.above += c.above;
      p.sum.at_hi += c.at_hi;
      p.sum.at_lo += c.at_lo;
    }
    p.sum.inside = used.load();
    p.sum.nans = nans.load();
    p.overflow = p.sum.inside > capacity_;
    pass_ = std::move(p);
  }

  Threshold direct(int64_t k) {
    thread_local Scratch memory;
    int32_t* const keys = memory.get<int32_t>(total_ + kSelectPad);
    int64_t nans = 0, at = 0;
    {
      const IeeeDenormals mode;
      for (const SelectMember& m : members_)
        for_runs(m, 0, m.n, [&](const SelectRun& run) {
          nans += kernels_.keys(run, keys + at);
          at += run.n;
        });
    }
    check_nans(nans);
    const Ranked r = key_select()(kernels_, keys, total_, k);
    Threshold t;
    t.key = r.key;
    t.above = r.above;
    t.equal = r.equal;
    t.nans = nans;
    t.path = SelectPath::direct;
    t.gathered = total_;
    return t;
  }

  // The keys of a sample: a cluster from each of as many equal stretches of the selection.
  void sample(const SampleSize& size, int32_t* out) const {
    parallel_for(0, size.clusters(), std::max<int64_t>(256, (size.clusters() + parts_ - 1) / parts_),
                 [&](int64_t i, int64_t end) {
                   const IeeeDenormals mode;
                   while (i < end) {
                     // Every cluster is a miss in the caches and in the TLB: a batch of them at once.
                     constexpr int kBatch = 64;
                     Cluster at[kBatch];
                     const int count = static_cast<int>(std::min<int64_t>(kBatch, end - i));
                     for (int j = 0; j < count; ++j) {
                       at[j] = cluster(i + j, size);
                       for_runs(*at[j].member, at[j].begin, at[j].end, [](const SelectRun& run) {
                         __builtin_prefetch(run.w);
                         if (run.g) __builtin_prefetch(run.g);
                       });
                     }
                     for (int j = 0; j < count; ++j)
                       cluster_keys(at[j], size.cluster, out + (i + j) * size.cluster);
                     i += count;
                   }
                 });
  }

  struct Cluster {
    const SelectMember* member;
    int64_t begin, end;
  };
  // The block of elements of one member (fewer at its end) that holds the i-th position.
  Cluster cluster(int64_t i, const SampleSize& size) const {
    const int64_t at = sample_position(i, size.log_clusters, total_);
    const auto member = std::upper_bound(starts_.begin(), starts_.end(), at) - starts_.begin() - 1;
    const int64_t begin = (at - starts_[member]) / size.cluster * size.cluster;
    return {&members_[member], begin, std::min(members_[member].n, begin + size.cluster)};
  }

  // A block that is short is repeated, so that each of its elements is as likely as any other's.
  void cluster_keys(const Cluster& c, int64_t size, int32_t* out) const {
    int32_t* to = out;
    for_runs(*c.member, c.begin, c.end, [&](const SelectRun& run) {
      kernels_.keys(run, to);
      to += run.n;
    });
    for (int64_t n = c.end - c.begin, i = n; i < size; ++i) out[i] = out[i - n];
  }

  // What the keys of a sample are worth, from themselves: those that lie beside each other are alike in many
  // tensors, and then a cluster is worth less than its size. Looked at where the keys are cut at rank `rank`,
  // or not too near an end, where a few clusters would decide.
  SampleSpread spread(const int32_t* keys, const SampleSize& size, int64_t rank) const {
    const int64_t m = size.keys();
    const int32_t pivot = key_select()(kernels_, keys, m, std::clamp(rank, m / 8, m - m / 8)).key;
    SampleSpread out;
    int64_t before[2] = {0, 0}, sum[2] = {0, 0}, steps[2] = {0, 0}, mixed[2] = {0, 0};
    int32_t unused[kSelectPad];
    for (int64_t i = 0; i < size.clusters(); ++i) {
      const SelectCounts c =
          kernels_.bracket({raw_run(keys + i * size.cluster, size.cluster), pivot, pivot, true, unused});
      const int64_t count[2] = {c.above, c.above + c.at_hi};  // without and with the ties
      for (int e = 0; e < 2; ++e) {
        sum[e] += count[e];
        mixed[e] += count[e] * (size.cluster - count[e]);
        if (i) steps[e] += (count[e] - before[e]) * (count[e] - before[e]);
        before[e] = count[e];
      }
    }
    for (int e = 0; e < 2; ++e) {
      const double p = static_cast<double>(sum[e]) / static_cast<double>(m);
      const double alone = static_cast<double>(m) * p * (1.0 - p);  // the variance of as many draws
      if (alone <= 0.0) continue;
      // From one cluster to the next: a trend along the data is not chance, as every stretch has a cluster.
      out.variance = std::max(out.variance, 0.5 * static_cast<double>(steps[e]) / alone);
      // The share of pairs within a cluster that lie on both sides, beside that of independent keys.
      const double pairs = alone * static_cast<double>(size.cluster - 1);
      out.draw = std::max(out.draw,
                          static_cast<double>(size.cluster) * (1.0 - static_cast<double>(mixed[e]) / pairs));
    }
    return out;
  }

  Threshold sampled(int64_t k) {
    thread_local Scratch sample_memory, pool_memory;
    const SampleSize size(total_);
    const int64_t m = size.keys();
    int32_t* const keys = sample_memory.get<int32_t>(m);
    sample(size, keys);
    const auto expected =
        static_cast<int64_t>(static_cast<double>(k) / static_cast<double>(total_) * static_cast<double>(m));
    const SampleRanks ranks = bracket_ranks(k, total_, m, kSigmas, spread(keys, size, expected));
    Ranked hi = {INT32_MAX, 0, 0}, lo = {kSelectNone, 0, 0};
    if (ranks.hi >= 1) hi = key_select()(kernels_, keys, m, ranks.hi);
    if (ranks.lo <= m) lo = key_select()(kernels_, keys, m, ranks.lo);
    // Half as much again as is expected inside.
    const int64_t width = std::min(ranks.lo, m) - std::max<int64_t>(ranks.hi, 0) + 1;
    const bool heavy = std::max(hi.equal, lo.equal) > m / kHeavyShare;
    const double share =
        static_cast<double>(width + (heavy ? 0 : hi.equal + lo.equal)) / static_cast<double>(m);
    capacity_ = std::min<int64_t>(
        {total_, static_cast<int64_t>(1.5 * share * static_cast<double>(total_)) + chunk_, int64_t{1} << 30});
    pool_ = pool_memory.get<int32_t>(capacity_ + kSelectPad);

    if (!heavy) {  // the ends are few: gathered too
      if (hi.key != INT32_MAX) ++hi.key;
      if (lo.key != kSelectNone) --lo.key;
    }
    pass(lo.key, hi.key, heavy);
    check_nans(pass_.sum.nans);
    Threshold t;
    return settle(k, t) ? t : radix(k);
  }

  // The threshold, if the last pass holds it.
  bool settle(int64_t k, Threshold& t) const {
    const SelectCounts& c = pass_.sum;
    const int64_t before_inside = c.above + c.at_hi, before_lo = before_inside + c.inside;
    t.nans = c.nans;
    t.gathered = c.inside;
    if (k <= c.above || k > before_lo + c.at_lo) return false;
    if (k <= before_inside) {
      t.key = hi_;
      t.above = c.above;
      t.equal = c.at_hi;
      t.path = SelectPath::bracket_end;
    } else if (k > before_lo) {
      t.key = lo_;
      t.above = before_lo;
      t.equal = c.at_lo;
      t.path = SelectPath::bracket_end;
    } else {
      if (pass_.overflow) return false;
      const Ranked r = key_select()(kernels_, pool_, c.inside, k - before_inside);
      t.key = r.key;
      t.above = before_inside + r.above;
      t.equal = r.equal;
      t.path = SelectPath::bracket_inside;
    }
    return true;
  }

  // 11 bits of the key a pass, until what is left fits the pool or is one key. Three passes at most.
  Threshold radix(int64_t k) {
    constexpr int kBits[] = {11, 11, 10};
    constexpr int64_t kBins = 1 << 11;
    uint32_t first = 0;  // the range of keys, as unsigned numbers in the same order
    int left = 32;
    int64_t above = 0;
    for (int bits : kBits) {
      left -= bits;
      const uint32_t last = first + static_cast<uint32_t>((uint64_t{1} << (left + bits)) - 1);
      const std::vector<int64_t> bins = histogram(first, last, left, kBins);
      int64_t bin = (int64_t{1} << bits) - 1;
      for (; above + bins[bin] < k; --bin) above += bins[bin];
      first += static_cast<uint32_t>(bin) << left;
      if (bins[bin] <= capacity_ || left == 0) break;
    }
    pass(from_ordered(first), from_ordered(first + ((uint32_t{1} << left) - 1)), true);
    Threshold t;
    settle(k, t);
    t.path = SelectPath::radix;
    return t;
  }

  static int32_t from_ordered(uint32_t u) { return static_cast<int32_t>(u ^ 0x80000000u); }
  static uint32_t to_ordered(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }

  // How many keys of [first, last] have each value of (key - first) >> shift.
  std::vector<int64_t> histogram(uint32_t first, uint32_t last, int shift, int64_t bins) const {
    // Four counters a bin: equal keys in a row would otherwise wait for each other's store.
    constexpr int kWays = 4;
    std::vector<std::vector<int64_t>> counts(parts_, std::vector<int64_t>(bins * kWays));
    const int32_t lo = from_ordered(first), hi = from_ordered(last);
    for_chunks([&](int64_t part, int64_t index) {
      const Chunk& c = chunks_[index];
      int32_t* const keys = chunk_keys();
      int64_t* const count = counts[part].data();
      int64_t at_hi = 0, at_lo = 0, inside = 0;
      for_runs(members_[c.member], c.begin, c.end, [&](const SelectRun& run) {
        const SelectCounts r = kernels_.bracket({run, lo, hi, true, keys + inside});
        at_hi += r.at_hi;
        at_lo += r.at_lo;
        inside += r.inside;
      });
      for (int64_t i = 0; i < inside; ++i)
        ++count[((to_ordered(keys[i]) - first) >> shift) * kWays + i % kWays];
      count[((last - first) >> shift) * kWays] += at_hi;
      count[0] += at_lo;
    });
    std::vector<int64_t> out(bins);
    for (const auto& part : counts)
      for (int64_t i = 0; i < bins * kWays; ++i) out[i / kWays] += part[i];
    return out;
  }

  // equal[c] = elements of chunk c whose key is the threshold, from what the last pass left behind.
  void count_equal(const Threshold& t, std::vector<int64_t>& equal) {
    if (t.path == SelectPath::direct) pass(t.key, t.key, true);
    int32_t unused[kSelectPad];
    for (size_t c = 0; c < equal.size(); ++c) {
      const ChunkCounts& n = pass_.chunks[c];
      if (t.key == hi_ || t.key == lo_) {
        equal[c] = t.key == hi_ ? n.at_hi : n.at_lo;
      } else {
        equal[c] = kernels_.bracket({raw_run(pool_ + n.offset, n.inside), t.key, t.key, true, unused}).at_hi;
      }
    }
  }

  static KeySelect& key_select() {
    thread_local KeySelect select;
    return select;
  }

  const std::vector<SelectMember>& members_;
  const NanRule nan_;
  const SelectKernels kernels_;
  std::vector<int64_t> starts_;
  std::vector<Chunk> chunks_;
  int64_t total_ = 0, parts_ = 1, chunk_ = kMinChunk;
  // The last pass, its bracket and pool: where count_equal finds the ties.
  Pass pass_;
  int32_t lo_ = 0, hi_ = 0;
  int32_t* pool_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace

const char* select_path_name(SelectPath path) {
  constexpr const char* kNames[] = {"none", "direct", "bracket_end", "bracket_inside", "radix"};
  return kNames[static_cast<int>(path)];
}

float key_value(int32_t key) {
  if (key == kSelectNan) return std::numeric_limits<float>::quiet_NaN();
  if (key > kSelectInf) return std::numeric_limits<float>::infinity();
  return key >= 0 ? bits_float(static_cast<uint32_t>(key)) : -bits_float(static_cast<uint32_t>(-key));
}

Threshold select_threshold(const std::vector<SelectMember>& members, int64_t k, const NanRule& nan) {
  return Selection(members, nan).find(k);
}

Threshold select_mask_global(const std::vector<SelectMember>& members, int64_t k, const NanRule& nan,
                             uint8_t* const* masks) {
  Selection s(members, nan);
  const Threshold t = s.find(k);
  s.for_selected(t, [&](int64_t, int64_t index, int64_t ties) {
    const Chunk& c = s.chunks()[index];
    s.write_mask(t, c, ties, masks[c.member] + c.begin);
  });
  return t;
}

namespace {

// Stable, least significant digit first; a digit that all keys share costs one read.
void sort_descending(std::vector<uint32_t>& keys, std::vector<int64_t>& indices) {
  constexpr int kBits = 11;
  const size_t n = keys.size();
  std::vector<uint32_t> keys_out(n);
  std::vector<int64_t> indices_out(n);
  for (int shift = 0; shift < 32; shift += kBits) {
    int64_t starts[1 << kBits] = {};
    const auto digit = [&](uint32_t key) { return ~(key >> shift) & ((1u << kBits) - 1); };
    for (uint32_t key : keys) ++starts[digit(key)];
    int64_t at = 0;
    bool one_bin = false;
    for (int64_t& s : starts) {
      const int64_t count = s;
      one_bin = one_bin || count == static_cast<int64_t>(n);
      s = at;
      at += count;
    }
    if (one_bin) continue;
    for (size_t i = 0; i < n; ++i) {
      const int64_t to = starts[digit(keys[i])]++;
      keys_out[to] = keys[i];
      indices_out[to] = indices[i];
    }
    keys.swap(keys_out);
    indices.swap(indices_out);
  }
}

}  // namespace

void select_sorted(const SelectMember& m, int64_t k, const NanRule& nan, void* values, int64_t* indices) {
  const std::vector<SelectMember> members{m};
  Selection s(members, nan);
  const Threshold t = s.find(k);
  // Chunks finish in any order: each puts its elements where there is room, and notes where.
  struct Found {
    int64_t offset = 0, count = 0;
  };
  std::vector<Found> found(s.chunks().size());
  std::vector<uint32_t> loose_keys(k);
  std::vector<int64_t> loose_indices(k);
  std::atomic<int64_t> used{0};
  s.for_selected(t, [&](int64_t, int64_t index, int64_t ties) {
    thread_local Scratch key_memory, mask_memory;
    const Chunk& c = s.chunks()[index];
    const int64_t n = c.end - c.begin;
    int32_t* const keys = key_memory.get<int32_t>(n);
    uint8_t* const mask = mask_memory.get<uint8_t>(n);
    s.write_mask(t, c, ties, mask);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += mask[i];
    if (count == 0) return;
    s.write_keys(c, keys);
    int64_t at = used.fetch_add(count, std::memory_order_relaxed);
    found[index] = {at, count};
    for (int64_t i = 0; count > 0; ++i)
      if (mask[i]) {
        loose_keys[at] = static_cast<uint32_t>(keys[i]) ^ 0x80000000u;
        loose_indices[at++] = c.begin + i;
        --count;
      }
  });
  std::vector<uint32_t> keys;
  std::vector<int64_t> order;
  keys.reserve(k);
  order.reserve(k);
  for (const Found& f : found) {
    keys.insert(keys.end(), loose_keys.begin() + f.offset, loose_keys.begin() + f.offset + f.count);
    order.insert(order.end(), loose_indices.begin() + f.offset, loose_indices.begin() + f.offset + f.count);
  }
  sort_descending(keys, order);
  std::copy(order.begin(), order.end(), indices);
  const auto take = [&](auto* out, const auto* in) {
    for (int64_t i = 0; i < k; ++i) out[i] = in[order[i]];
  };
  if (dtype_size(m.dtype) == 4) {
    take(static_cast<uint32_t*>(values), static_cast<const uint32_t*>(m.w));
  } else {
    take(static_cast<uint16_t*>(values), static_cast<const uint16_t*>(m.w));
  }
}

std::vector<int64_t> select_sample_positions(int64_t n) {
  std::vector<int64_t> out;
  if (n <= kDirect) return out;
  const SampleSize size(n);
  for (int64_t i = 0; i < size.clusters(); ++i) {
    const int64_t begin = sample_position(i, size.log_clusters, n) / size.cluster * size.cluster;
    for (int64_t at = begin; at < std::min(n, begin + size.cluster); ++at) out.push_back(at);
  }
  return out;
}

}  // namespace pared
