#include "cuda/emulate/simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/check.h"
#include "cuda/emulate/banks.h"
#include "cuda/emulate/races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the caller's registers on its stack, its stack pointer in *from, and goes on where `to` was saved.
#if defined(__x86_64__)
extern "C" void pared_emulate_switch(void** from, void* to);
asm(R"(
.text
.globl pared_emulate_switch
.hidden pared_emulate_switch
.type pared_emulate_switch, @function
pared_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pared_emulate_switch, .-pared_emulate_switch
)");
#else
#include <ucontext.h>
#endif

namespace pared::cuda::emulate {

Uint3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStack = size_t{256} << 10;       // reserved; only touched pages are taken
constexpr size_t kMostShared = size_t{227} << 10;  // sm_90; sm_80 has 163 KB
constexpr size_t kMostStatic = size_t{48} << 10;   // and of all, where a kernel does not ask for more
constexpr size_t kCanary = 64;
constexpr unsigned char kPoison = 0xff, kCanaryByte = 0xa5;
constexpr int kBarriers = 16;

enum class State : uint8_t { ready, barrier, warp, mbarrier, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

void deliver(const Copy& c) {
  std::memcpy(c.to, c.from, c.valid);
  std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
}

struct Fiber {
  State state;
  Uint3 index;
  Where where;
  // What it waits for.
  const char* kind;
  uint32_t mask;
  void* operands;
  int barrier, result;
  const uint64_t* mbarrier;
  int parity;
  // cp.async groups; the last is open.
  std::deque<std::vector<Copy>> groups;
  // wgmma groups, likewise.
  std::deque<std::vector<std::function<void()>>> products;

  void* stack = nullptr;
#if defined(__x86_64__)
  void* saved;
#else
  ucontext_t saved;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif
};

struct Barrier {
  Races::Rounds rounds;
  int arrived = 0, threads = 0, count = 0;
  Where where = {nullptr, 0};
};

// One instruction of the copy engine.
struct BulkCopy {
  std::vector<Copy> pieces;
  int bytes;
  uint64_t* bar;
  int thread = 0;  // that asked for it, in this round
  uint32_t round = 0;
};

// The 64 bits of an mbarrier.
struct MBarrier {
  uint64_t phase : 1, pending : 20, count : 20;
  int64_t bytes : 23;
};
static_assert(sizeof(MBarrier) == sizeof(uint64_t));

MBarrier read(const uint64_t* bar) {
  MBarrier b;
  std::memcpy(&b, bar, sizeof b);
  return b;
}
void write(uint64_t* bar, MBarrier b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.count;
  }
  std::memcpy(bar, &b, sizeof b);
}

std::string at(Where w) { return place_name(w, nullptr); }

// The one machine: kernels of two Python threads take turns.
struct Machine {
  std::mutex turn;
  uint64_t order = 0;
  std::map<std::string, int64_t> launched;
  bool banks = false;   // what record_banks says
  bool noting = false;  // a thread runs, on its own account, and accesses are to be noted
  Races races;
  std::map<const uint64_t*, Races::Rounds> through;  // mbarriers
  std::vector<bool> written;  // bytes of shared memory, by threads of this block; where accesses are noted

  std::vector<std::unique_ptr<Fiber>> fibers;
  int threads = 0, done = 0;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  const char* kernel = nullptr;
  std::string error;
  Barrier barriers[kBarriers];
  std::vector<BulkCopy> bulk;
  std::vector<unsigned char> shared;
  size_t dynamic_bytes = 0, static_used = 0, granted = 0;
  std::map<const Slot*, size_t> slots;
#if defined(__x86_64__)
  void* scheduler;
#else
  ucontext_t scheduler;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  const void* scheduler_stack;
  size_t scheduler_stack_bytes;
#endif

  // Static shared memory lies behind the canary of the dynamic.
  unsigned char* dynamic_begin() {
    return shared.data() + (-reinterpret_cast<uintptr_t>(shared.data()) & 1023);
  }
  unsigned char* static_begin() { return dynamic_begin() + (dynamic_bytes + kCanary + 1023) / 1024 * 1024; }

  void to_scheduler(bool last = false) {
    Fiber* f = current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &f->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
#if defined(__x86_64__)
    pared_emulate_switch(&f->saved, scheduler);
#else
    swapcontext(&f->saved, &scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f->fake_stack, nullptr, nullptr);
#endif
  }

  void to_fiber(Fiber* f) {
    current = f;
    thread_index = f->index;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack, f->stack, kStack);
#endif
#if defined(__x86_64__)
    pared_emulate_switch(&scheduler, f->saved);
#else
    swapcontext(&scheduler, &f->saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    current = nullptr;
  }

  void note(const void* p, size_t bytes, Touch what, Where where, const void* pc) {
    const auto* at = static_cast<const unsigned char*>(p);
    if (!noting || !current || at < dynamic_begin() || at >= static_begin() + kMostStatic) return;
    const auto offset = static_cast<size_t>(at - dynamic_begin());
    const int thread = number(current);
    note_access(thread, what, where, pc, offset, bytes);
    race(races.access(thread, offset, bytes, what, where, pc), pc, where);
    if (what == Touch::write || what == Touch::atomic)
      std::fill_n(written.begin() + static_cast<int64_t>(offset), bytes, true);
  }

  void race(const std::string& text, const void* pc, Where where) {
    if (!text.empty()) fail(pc ? text + " (here in " + place_name(where, pc) + ")" : text, where);
  }
  // The copy engine writes on behalf of the thread that asks.
  void engine_writes(const void* p, int bytes, Where where) {
    by_engine(p, bytes, where);
    if (!noting) return;
    const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(p) - dynamic_begin());
    race(races.access(number(current), offset, static_cast<size_t>(bytes), Touch::copy, where, nullptr),
         nullptr, where);
    bulk.back().thread = number(current);
    bulk.back().round = races.round(number(current));
  }

  void by_engine(const void* p, int bytes, Where where) {
    const auto first = written.begin() + (static_cast<const unsigned char*>(p) - dynamic_begin());
    if (banks && std::find(first, first + bytes, true) != first + bytes)
      fail("the copy engine or wgmma takes shared memory that threads have written, without a fence", where);
  }

  void wait(State state, Where where) {
    current->state = state;
    current->where = where;
    to_scheduler();
  }

  int number(const Fiber* f) const {
    return static_cast<int>(f->index.x + block_size.x * (f->index.y + block_size.y * f->index.z));
  }
};

Machine& machine() {
  static Machine m;
  return m;
}

[[noreturn]] void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  (*m.body)();
  m.current->state = State::done;
  ++m.done;
  m.to_scheduler(true);
  __builtin_unreachable();
}

void start(Fiber& f) {
  if (!f.stack) {
    f.stack =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f.stack == MAP_FAILED) throw std::bad_alloc();
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, kStack);
  f.fake_stack = nullptr;
#endif
#if defined(__x86_64__)
  // Six registers, the address to return to, and a zero in the place of a caller.
  void** top = reinterpret_cast<void**>(static_cast<char*>(f.stack) + kStack) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  f.saved = top;
#else
  getcontext(&f.saved);
  f.saved.uc_stack.ss_sp = f.stack;
  f.saved.uc_stack.ss_size = kStack;
  f.saved.uc_link = nullptr;
  makecontext(&f.saved, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
}

// Why nobody can go on.
std::string stuck(const Machine& m) {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < m.threads; ++i) {
    const Fiber& f = *m.fibers[i];
    std::string what;
    switch (f.state) {
      case State::barrier: what = str("wait at barrier ", f.barrier, " in ", at(f.where)); break;
      case State::warp:
        what = str("wait at ", f.kind, " in ", at(f.where), " for lanes 0x", std::hex, f.mask);
        break;
      case State::mbarrier: what = "wait at an mbarrier in " + at(f.where); break;
      default: what = "have ended"; break;
    }
    groups[what].push_back(i);
  }
  std::string text = "not all threads reach the same barrier or warp operation:";
  for (const auto& [what, who] : groups)
    text += str(" ", who.size(), " threads (the first is ", who.front(), ") ", what, ";");
  text.pop_back();
  return text;
}

bool can_go_on(Fiber& f) {
  if (f.state == State::mbarrier && read(f.mbarrier).phase != static_cast<unsigned>(f.parity))
    f.state = State::ready;
  return f.state == State::ready;
}

// A bulk copy on whose barrier somebody waits: as late as it can come.
bool deliver_bulk(Machine& m) {
  for (auto c = m.bulk.begin(); c != m.bulk.end(); ++c) {
    const bool wanted = std::any_of(m.fibers.begin(), m.fibers.begin() + m.threads, [&](const auto& f) {
      return f->state == State::mbarrier && f->mbarrier == c->bar;
    });
    if (!wanted) continue;
    for (const Copy& piece : c->pieces) deliver(piece);
    if (m.noting) Races::give_round(c->thread, c->round, m.through[c->bar]);
    MBarrier b = read(c->bar);
    b.bytes -= c->bytes;
    write(c->bar, b);
    m.bulk.erase(c);
    return true;
  }
  return false;
}

void run_block(Machine& m, const std::vector<int>& order) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(m.shared.data(), m.shared.size());
#endif
  std::memset(m.dynamic_begin(), kPoison, m.dynamic_bytes);
  std::memset(m.static_begin(), kPoison, kMostStatic);
  unsigned char* const canary = m.dynamic_begin() + m.dynamic_bytes;
  std::memset(canary, kCanaryByte, kCanary);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(canary, static_cast<size_t>(m.static_begin() - canary));
#endif
  m.done = 0;
  m.noting = m.banks;
  m.bulk.clear();
  for (Barrier& b : m.barriers) b = {};
  for (int i = 0; i < m.threads; ++i) {
    Fiber& f = *m.fibers[i];
    f.state = State::ready;
    const auto t = static_cast<unsigned>(i);
    f.index = {t % block_size.x, t / block_size.x % block_size.y, t / (block_size.x * block_size.y)};
    f.groups.assign(1, {});
    f.products.assign(1, {});
    start(f);
  }
  m.through.clear();
  if (m.noting) begin_notes(m.kernel, m.threads), m.races.begin(m.threads);
  m.written.assign(m.noting ? m.shared.size() : 0, false);
  while (m.done < m.threads) {
    bool progress = false;
    for (const int i : order) {
      Fiber& f = *m.fibers[i];
      if (!can_go_on(f)) continue;
      progress = true;
      m.to_fiber(&f);
      if (!m.error.empty()) return;
    }
    if (progress || deliver_bulk(m)) continue;
    m.error = stuck(m);
    return;
  }
  if (m.noting) settle_notes(0, m.threads);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(canary, kCanary);
#endif
  if (std::any_of(canary, canary + kCanary, [](unsigned char c) { return c != kCanaryByte; }))
    m.error = "wrote behind its dynamic shared memory";
  else if (!m.bulk.empty()) m.error = "ended with a bulk copy for which nobody has waited";
}

void release(Machine& m, int id) {
  for (int i = 0; i < m.threads; ++i) {
    Fiber& f = *m.fibers[i];
    if (f.state != State::barrier || f.barrier != id) continue;
    f.state = State::ready;
    f.result = m.barriers[id].count;
    if (m.noting) m.races.take(i, m.barriers[id].rounds);
  }
}

// Returns true when the caller was the last.
bool arrive(Machine& m, int id, int threads, bool predicate, Where where) {
  if (id < 0 || id >= kBarriers) fail(str("no barrier ", id), where);
  if (threads == 0) threads = m.threads;
  if (threads % 32 && threads != m.threads)
    fail(str("a barrier of ", threads, " threads, not whole warps"), where);
  Barrier& b = m.barriers[id];
  if (b.arrived && b.threads != threads)
    fail(str("barrier ", id, " of ", threads, " threads here and of ", b.threads, " in ", at(b.where)),
         where);
  // Barrier 0 is __syncthreads: the hardware would count arrivals at two places as one barrier.
  if (b.arrived && id == 0 && (b.where.line != where.line || std::strcmp(b.where.file, where.file) != 0))
    fail("some threads are at this __syncthreads, others in " + at(b.where), where);
  b.threads = threads;
  b.where = where;
  if (b.arrived == 0) b.count = 0;
  b.count += predicate;
  if (m.noting) {
    if (b.arrived == 0) b.rounds.clear();
    m.races.give(m.number(m.current), b.rounds);
  }
  if (++b.arrived < threads) return false;
  b.arrived = 0;
  if (m.noting && threads == m.threads) settle_notes(0, m.threads), m.races.all_met();
  release(m, id);
  return true;
}

std::vector<int64_t> ordered(int64_t n, uint64_t seed, uint64_t salt) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) {
    std::mt19937_64 random(seed * 0x9e3779b97f4a7c15u + salt);
    for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  }
  return order;
}

}  // namespace

void run(const char* kernel, Uint3 grid, Uint3 block, size_t dynamic_shared_bytes, bool asks,
         const std::function<void()>& thread) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.turn);
  const auto refuse = [&](const std::string& why) { throw std::runtime_error(str(kernel, ": ", why)); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) refuse(str("a block of ", threads, " threads"));
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse(str("a grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks"));
  if (dynamic_shared_bytes > (asks ? kMostShared : kMostStatic))
    refuse(str(dynamic_shared_bytes, " bytes of shared memory"));
  ++m.launched[kernel];
  m.threads = static_cast<int>(threads);
  while (m.fibers.size() < threads) m.fibers.push_back(std::make_unique<Fiber>());
  m.body = &thread;
  m.kernel = kernel;
  m.error.clear();
  m.dynamic_bytes = dynamic_shared_bytes;
  m.granted = asks ? kMostShared : kMostStatic;
  m.shared.resize(kMostShared + kMostStatic + 4096);
  m.slots.clear();
  m.static_used = 0;
  grid_size = grid;
  block_size = block;
  for (const int64_t b : ordered(static_cast<int64_t>(blocks), m.order, 0)) {
    const auto i = static_cast<uint64_t>(b);
    block_index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
    const std::vector<int64_t> order = ordered(m.threads, m.order, i + 1);
    run_block(m, {order.begin(), order.end()});
    if (!m.error.empty())
      refuse(str("block ", block_index.x, ",", block_index.y, ",", block_index.z, ": ", m.error));
  }
}

void set_order(uint64_t seed) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.turn);
  m.order = seed;
}

std::map<std::string, int64_t> take_launched() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.turn);
  return std::exchange(m.launched, {});
}

void record_banks(bool on) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.turn);
  m.banks = on;
}
void touch(const void* p, size_t bytes, Touch what, Where where) {
  machine().note(p, bytes, what, where, nullptr);
}
void touched(const void* p, size_t bytes, Touch what, const void* pc) {
  machine().note(p, bytes, what, {nullptr, 0}, pc);
}
void called(const void* caller) {
  Machine& m = machine();
  if (m.banks && m.current) note_call(m.number(m.current), caller);
}
void returned() {
  Machine& m = machine();
  if (m.banks && m.current) note_return(m.number(m.current));
}

void fail(const std::string& what, Where where) {
  Machine& m = machine();
  if (!m.current) throw std::runtime_error(what);  // not in a kernel
  m.error = str("thread ", m.number(m.current), " in ", at(where), ": ", what);
  m.to_scheduler();
  __builtin_unreachable();
}

int barrier(int id, int threads, bool predicate, Where where) {
  Machine& m = machine();
  if (arrive(m, id, threads, predicate, where)) {
    if (m.noting) m.races.take(m.number(m.current), m.barriers[id].rounds);
    return m.barriers[id].count;
  }
  m.current->barrier = id;
  m.wait(State::barrier, where);
  return m.current->result;
}

void barrier_arrive(int id, int threads, Where where) { arrive(machine(), id, threads, false, where); }

int lane() { return machine().number(machine().current) % 32; }

void collective(const char* kind, uint32_t mask, void* operands, void (*complete)(void**, uint32_t),
                Where where) {
  Machine& m = machine();
  Fiber* self = m.current;
  const int first = m.number(self) / 32 * 32;
  if (!(mask >> (m.number(self) - first) & 1))
    fail(str(kind, ": the calling lane is not in its mask"), where);
  self->kind = kind;
  self->mask = mask;
  self->operands = operands;
  self->where = where;
  const auto here = [&](int i) {
    if (first + i >= m.threads) fail(str(kind, ": lane ", i, " of the mask does not exist"), where);
    const Fiber* f = m.fibers[first + i].get();
    return f == self || (f->state == State::warp && f->kind == kind && f->mask == mask &&
                         f->where.line == where.line && std::strcmp(f->where.file, where.file) == 0);
  };
  // The ends first: in order or in reverse, the last to come is one of them.
  if (!here(31 - __builtin_clz(mask)) || !here(__builtin_ctz(mask))) return m.wait(State::warp, where);
  void* all[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (!here(i)) return m.wait(State::warp, where);
    all[i] = m.fibers[first + i]->operands;
  }
  const bool noting = std::exchange(m.noting, false);  // on behalf of all lanes
  complete(all, mask);
  m.noting = noting;
  if (noting && mask == kFullWarp) settle_notes(first, first + 32);
  if (noting && std::strcmp(kind, "__syncwarp") == 0) {
    std::vector<int> lanes;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) lanes.push_back(first + i);
    m.races.met(lanes);
  }
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) m.fibers[first + i]->state = State::ready;
}

void* static_shared(const Slot& slot, size_t align) {
  Machine& m = machine();
  const auto [entry, fresh] = m.slots.try_emplace(&slot, (m.static_used + align - 1) / align * align);
  if (fresh) m.static_used = entry->second + slot.bytes;
  if (m.static_used > kMostStatic) fail("more than 48 KB of static shared memory", {nullptr, 0});
  // The dynamic begins at the next multiple of its alignment.
  if (const size_t all = (m.static_used + 1023) / 1024 * 1024 + m.dynamic_bytes;
      m.dynamic_bytes && all > m.granted)
    fail(str(all, " bytes of static and dynamic shared memory, where ", m.granted, " are granted"),
         {nullptr, 0});
  return m.static_begin() + entry->second;
}

unsigned char* dynamic_shared() { return machine().dynamic_begin(); }

bool is_shared(const void* p, size_t bytes) {
  Machine& m = machine();
  const auto* c = static_cast<const unsigned char*>(p);
  const auto inside = [&](const unsigned char* begin, size_t n) {
    return c >= begin && c + bytes <= begin + n;
  };
  return inside(m.dynamic_begin(), m.dynamic_bytes) || inside(m.static_begin(), m.static_used);
}

void copy_async(void* shared, const void* global, int bytes, int valid, Where where) {
  const auto s = reinterpret_cast<uintptr_t>(shared), g = reinterpret_cast<uintptr_t>(global);
  if (!is_shared(shared, bytes)) fail("cp.async: the destination is not shared memory", where);
  if (s % bytes || (valid && g % bytes)) fail("cp.async: misaligned address", where);
  touch(shared, bytes, Touch::copy, where);
  std::memset(shared, kPoison, bytes);
  machine().current->groups.back().push_back({shared, global, bytes, valid});
}

void copy_commit() { machine().current->groups.emplace_back(); }

void copy_wait(int groups_in_flight) {
  auto& groups = machine().current->groups;
  while (static_cast<int>(groups.size()) - 1 > groups_in_flight) {
    for (const Copy& c : groups.front()) deliver(c);
    groups.pop_front();
  }
}

void mbarrier_init(uint64_t* bar, int count, Where where) {
  if (!is_shared(bar, 8) || reinterpret_cast<uintptr_t>(bar) % 8)
    fail("mbarrier: expected 8 aligned bytes of shared memory", where);
  MBarrier b;
  b.phase = 0;
  b.pending = b.count = static_cast<uint64_t>(count);
  b.bytes = 0;
  std::memcpy(bar, &b, sizeof b);
}

void mbarrier_arrive(uint64_t* bar, int transaction_bytes, Where where) {
  MBarrier b = read(bar);
  if (b.pending == 0) fail("mbarrier: more arrivals than expected", where);
  Machine& m = machine();
  if (m.noting) m.races.give(m.number(m.current), m.through[bar]);
  --b.pending;
  b.bytes += transaction_bytes;
  write(bar, b);
}

void mbarrier_wait(uint64_t* bar, int parity, Where where) {
  Machine& m = machine();
  if (read(bar).phase == static_cast<unsigned>(parity)) {
    m.current->mbarrier = bar;
    m.current->parity = parity;
    m.wait(State::mbarrier, where);
  }
  if (m.noting) m.races.take(m.number(m.current), m.through[bar]);
}

void copy_bulk(void* shared, const void* global, int bytes, uint64_t* bar, Where where) {
  const auto s = reinterpret_cast<uintptr_t>(shared), g = reinterpret_cast<uintptr_t>(global);
  if (bytes % 16 || s % 16 || g % 16)
    fail("cp.async.bulk: addresses and size are not multiples of 16", where);
  if (!is_shared(shared, bytes)) fail("cp.async.bulk: the destination is not shared memory", where);
  std::memset(shared, kPoison, bytes);
  machine().bulk.push_back({{{shared, global, bytes, bytes}}, bytes, bar});
  machine().engine_writes(shared, bytes, where);
}

void copy_tensor(void* shared, const Matrix& from, int64_t column, int64_t row, uint64_t* bar, Where where) {
  constexpr int kChunk = 16, kChunks = 8;
  auto* to = static_cast<unsigned char*>(shared);
  const int bytes = from.box_rows * kChunk * kChunks;
  if ((to - dynamic_shared()) % 1024) fail("cp.async.bulk.tensor: expected a multiple of 1024", where);
  if (!is_shared(shared, bytes)) fail("cp.async.bulk.tensor: the destination is not shared memory", where);
  std::memset(shared, kPoison, bytes);
  BulkCopy copy{{}, bytes, bar};
  for (int r = 0; r < from.box_rows; ++r)
    for (int c = 0; c < kChunks; ++c) {
      const int64_t at = column + c * kChunk, left = row + r < from.rows ? from.row_bytes - at : 0;
      copy.pieces.push_back({to + (r * kChunks + (c ^ r % 8)) * kChunk,
                             static_cast<const char*>(from.base) + (row + r) * from.stride + at, kChunk,
                             static_cast<int>(std::clamp<int64_t>(left, 0, kChunk))});
    }
  machine().bulk.push_back(std::move(copy));
  machine().engine_writes(shared, bytes, where);
}

uint32_t shared_address(const void* p) {
  const auto* c = static_cast<const unsigned char*>(p);
  if (!is_shared(p, 1)) fail("expected the address of shared memory", {nullptr, 0});
  return static_cast<uint32_t>(c - dynamic_shared());
}

void read_by_engine(uint64_t address, int bytes, Where where) {
  machine().by_engine(machine().dynamic_begin() + address, bytes, where);
}

void defer(std::function<void()> product) {
  machine().current->products.back().push_back(std::move(product));
}
void close_deferred() { machine().current->products.emplace_back(); }
void run_deferred(int groups_in_flight) {
  auto& groups = machine().current->products;
  while (static_cast<int>(groups.size()) - 1 > groups_in_flight) {
    const auto group = std::move(groups.front());
    groups.pop_front();
    for (const auto& product : group) product();
  }
}

}  // namespace pared::cuda::emulate
