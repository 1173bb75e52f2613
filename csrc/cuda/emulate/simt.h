// A CUDA grid on the CPU, for the tests of kernels on machines without a GPU: each thread of a block is a
// fiber, blocks run one after the other. What a GPU would leave undefined is made visible: shared memory
// starts as NaN patterns, threads and blocks can run in any order, and a barrier or shuffle that not all of
// its threads reach is an error that names them.
//
// This is the interface of the emulated headers (include/, ptx.h) and of launch.h. Kernels use CUDA's names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace pared::cuda::emulate {

struct Uint3 {
  unsigned x, y, z;
};

// Of the thread that runs.
extern Uint3 thread_index, block_index, block_size, grid_size;

// The place of a call in a kernel: two barriers at different places are different barriers.
struct Where {
  const char* file;
  int line;
};

// ---- for launch.h and the bindings

// Runs the grid to its end. Throws std::runtime_error that names the kernel when the configuration is one
// that a GPU refuses, or when its threads do what the opening comment calls an error. asks: for more shared
// memory than the 48 KB that every kernel is granted.
void run(const char* kernel, Uint3 grid, Uint3 block, size_t dynamic_shared, bool asks,
         const std::function<void()>& thread);

// 0: threads and blocks in their order; 1: in reverse; others: the seed of a random order, anew for each
// block.
void set_order(uint64_t seed);

// Kernels run since the last call, and how often.
std::map<std::string, int64_t> take_launched();

// ---- for kernels

inline constexpr uint32_t kFullWarp = 0xffffffffu;

// Ends the kernel with an error.
[[noreturn]] void fail(const std::string& what, Where where);

// bar.sync: waits until `threads` (0: all of the block) have reached barrier `id`; arrive does not wait.
// Returns over these threads how many gave true.
int barrier(int id, int threads, bool predicate, Where where);
void barrier_arrive(int id, int threads, Where where);

// An operation of the lanes in `mask`: the last to arrive calls complete(operands, mask), with what each lane
// gave or null, then all go on. `kind` is a string of which there is one, the address decides.
void collective(const char* kind, uint32_t mask, void* operands,
                void (*complete)(void** operands, uint32_t mask), Where where);

int lane();

// Shared memory of the running block. A slot is one declaration in one kernel.
struct Slot {
  explicit Slot(size_t bytes) : bytes(bytes) {}
  size_t bytes;
};
void* static_shared(const Slot& slot, size_t align);
unsigned char* dynamic_shared();
// Whether a pointer and the bytes behind it are shared memory of this kernel.
bool is_shared(const void* p, size_t bytes);

// cp.async: the destination holds NaN patterns until its group has been waited for.
void copy_async(void* shared, const void* global, int bytes, int valid, Where where);
void copy_commit();
void copy_wait(int groups_in_flight);

// mbarrier, 8 bytes of shared memory; bulk copies arrive only when somebody waits.
void mbarrier_init(uint64_t* bar, int count, Where where);
void mbarrier_arrive(uint64_t* bar, int transaction_bytes, Where where);
void mbarrier_wait(uint64_t* bar, int parity, Where where);
void copy_bulk(void* shared, const void* global, int bytes, uint64_t* bar, Where where);

// A tensor map: boxes of 128 bytes by some rows, swizzled for wgmma. Zeros beyond the matrix.
struct Matrix {
  const void* base;
  int64_t row_bytes, rows, stride;
  int box_rows;
};
void copy_tensor(void* shared, const Matrix& from, int64_t column, int64_t row, uint64_t* bar, Where where);

// Of dynamic shared memory alone, whose first byte is at 0.
uint32_t shared_address(const void* p);

// Bytes of dynamic shared memory that wgmma reads. The copy engine and wgmma see what threads have written
// only behind a fence.proxy.async, which no kernel has: that threads wrote there before is an error, found
// where accesses are noted (banks.h).
void read_by_engine(uint64_t address, int bytes, Where where);

// wgmma: products of the running thread run when their group is waited for, as late as they can.
void defer(std::function<void()> product);
void close_deferred();
void run_deferred(int groups_in_flight);

// Accesses to shared memory, for banks.h: of ptx.h and of atomics, which say so; of accesses.cc's builds.
// Others than those of a thread to shared memory are ignored.
enum class Touch : uint8_t { read, write, atomic, copy, matrix };
void touch(const void* p, size_t bytes, Touch what, Where where);
void touched(const void* p, size_t bytes, Touch what, const void* pc);
void called(const void* caller);
void returned();
// Of a function that says so itself.
#define PARED_UNSEEN __attribute__((no_sanitize("thread")))

// What `p` points to, after a check of its alignment.
template <class T>
const T& aligned(const T* p, Where where) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) fail("misaligned address", where);
  return *p;
}

}  // namespace pared::cuda::emulate
