// The functions of cuda/ptx.h for the emulator. What they do is said there.
#pragma once

#include <cuda.h>

#include "cuda/emulate/simt.h"

#define PARED_SHARED(type_, name)                                            \
  static const ::pared::cuda::emulate::Slot pared_slot_##name(               \
      sizeof(typename ::pared::cuda::SameType<type_>::type));                \
  auto& name = *static_cast<typename ::pared::cuda::SameType<type_>::type*>( \
      ::pared::cuda::emulate::static_shared(pared_slot_##name, 16))
#define PARED_DYNAMIC_SHARED(name) unsigned char* const name = ::pared::cuda::emulate::dynamic_shared()

namespace pared::cuda::ptx {

inline constexpr bool kBulkCopies = true;

inline int lane() { return emulate::lane(); }

template <int kTable>
uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i)
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t select) { return __byte_perm(a, b, select); }
inline uint32_t add_from_left(uint32_t v, int distance) {
  const uint32_t left = __shfl_up_sync(emulate::kFullWarp, v, distance);
  return lane() < distance ? v : v + left;
}

inline uint4 load_once(const uint4* p, PARED_HERE) { return emulate::aligned(p, PARED_WHERE); }

inline uint32_t shared_address(const void* p) { return emulate::shared_address(p); }
template <class T>
PARED_UNSEEN auto load_shared(uint32_t address, PARED_HERE) {
  const auto* p = reinterpret_cast<const T*>(emulate::dynamic_shared() + address);
  emulate::touch(p, sizeof(T), emulate::Touch::read, PARED_WHERE);
  if constexpr (sizeof(T) > 4) return emulate::aligned(p, PARED_WHERE);
  else return static_cast<uint32_t>(emulate::aligned(p, PARED_WHERE));
}

inline uint32_t take_shared(uint32_t some, uint32_t& address, PARED_HERE) {
  if (!some) return 0;
  address += 4;
  return load_shared<uint32_t>(address - 4, file, line);
}

inline void count_shared(uint32_t address, PARED_HERE) {
  atomicAdd(reinterpret_cast<uint32_t*>(emulate::dynamic_shared() + address), 1u, file, line);
}

template <int kBytes>
void copy_async(void* shared, const void* global, int valid = kBytes, PARED_HERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulate::copy_async(shared, global, kBytes, valid, PARED_WHERE);
}
inline void copy_commit() { emulate::copy_commit(); }
template <int kInFlight>
void copy_wait() {
  emulate::copy_wait(kInFlight);
}

inline void mbarrier_init(uint64_t* bar, int arrivals, PARED_HERE) {
  emulate::mbarrier_init(bar, arrivals, PARED_WHERE);
}
inline void fence_barrier_init() {}
inline void mbarrier_arrive(uint64_t* bar, PARED_HERE) { emulate::mbarrier_arrive(bar, 0, PARED_WHERE); }
inline void mbarrier_arrive_expect(uint64_t* bar, int bytes, PARED_HERE) {
  emulate::mbarrier_arrive(bar, bytes, PARED_WHERE);
}
inline void mbarrier_wait(uint64_t* bar, int parity, PARED_HERE) {
  emulate::mbarrier_wait(bar, parity, PARED_WHERE);
}
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* bar, PARED_HERE) {
  emulate::copy_bulk(shared, global, bytes, bar, PARED_WHERE);
}

inline void barrier_sync(int id, int threads, PARED_HERE) {
  emulate::barrier(id, threads, false, PARED_WHERE);
}
inline void barrier_arrive(int id, int threads, PARED_HERE) {
  emulate::barrier_arrive(id, threads, PARED_WHERE);
}

// ---- tensor cores

template <class C>
struct MmaOperands {
  C* c;
  const uint32_t *a, *b;
};

// The element types: how many a register holds, and what one is worth.
struct F16 {
  using C = float;
  using Sum = double;
  static constexpr int kPerRegister = 2;
  static Sum at(uint32_t r, int i) { return emulate::half_to_float(static_cast<uint16_t>(r >> (16 * i))); }
  static constexpr char kName[] = "mma.sync f16";
};
struct Bf16 {
  using C = float;
  using Sum = double;
  static constexpr int kPerRegister = 2;
  static Sum at(uint32_t r, int i) {
    return emulate::bfloat16_to_float(static_cast<uint16_t>(r >> (16 * i)));
  }
  static constexpr char kName[] = "mma.sync bf16";
};
struct S8 {
  using C = int32_t;
  using Sum = int64_t;
  static constexpr int kPerRegister = 4;
  static Sum at(uint32_t r, int i) { return static_cast<int8_t>(r >> (8 * i)); }
  static constexpr char kName[] = "mma.sync s8";
};

template <class T>
void mma(typename T::C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulate::Where where) {
  MmaOperands<typename T::C> mine{c, a, b};
  emulate::collective(
      T::kName, emulate::kFullWarp, &mine,
      [](void** all, uint32_t) {
        constexpr int n = T::kPerRegister, K = 8 * n;
        auto** lanes = reinterpret_cast<MmaOperands<typename T::C>**>(all);
        typename T::Sum A[16][K], B[8][K];
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < n; ++i) {
            const int g = l / 4, t = l % 4;
            for (int r = 0; r < 4; ++r)
              A[g + r % 2 * 8][n * t + r / 2 * 4 * n + i] = T::at(lanes[l]->a[r], i);
            for (int r = 0; r < 2; ++r) B[g][n * t + r * 4 * n + i] = T::at(lanes[l]->b[r], i);
          }
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
            typename T::Sum sum = lanes[l]->c[i];
            for (int k = 0; k < K; ++k) sum += A[row][k] * B[column][k];
            lanes[l]->c[i] = static_cast<typename T::C>(sum);
          }
      },
      where);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PARED_HERE) {
  mma<F16>(c, a, b, PARED_WHERE);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PARED_HERE) {
  mma<Bf16>(c, a, b, PARED_WHERE);
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PARED_HERE) {
  mma<S8>(c, a, b, PARED_WHERE);
}

struct MatrixOperands {
  uint32_t* r;
  const char* row;
};
inline constexpr char kLoadMatrices[] = "ldmatrix";
template <int kCount, bool kTransposed>
void load_matrices_of(uint32_t (&r)[kCount], const void* row, emulate::Where where) {
  if (emulate::lane() < 8 * kCount) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulate::fail("ldmatrix: misaligned row", where);
    if (!emulate::is_shared(row, 16)) emulate::fail("ldmatrix: a row is not in shared memory", where);
    emulate::touch(row, 16, emulate::Touch::matrix, where);
  }
  MatrixOperands mine{r, static_cast<const char*>(row)};
  emulate::collective(
      kLoadMatrices, emulate::kFullWarp, &mine,
      [](void** all, uint32_t) {
        auto** lanes = reinterpret_cast<MatrixOperands**>(all);
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < kCount; ++i) {
            uint16_t two[2];
            for (int j = 0; j < 2; ++j) {
              const int row = kTransposed ? l % 4 * 2 + j : l / 4,
                        column = kTransposed ? l / 4 : l % 4 * 2 + j;
              std::memcpy(&two[j], lanes[8 * i + row]->row + 2 * column, 2);
            }
            lanes[l]->r[i] = two[0] | uint32_t{two[1]} << 16;
          }
      },
      where);
}
template <int kCount>
void load_matrices(uint32_t (&r)[kCount], const void* row, PARED_HERE) {
  load_matrices_of<kCount, false>(r, row, PARED_WHERE);
}
template <int kCount>
void load_matrices_transposed(uint32_t (&r)[kCount], const void* row, PARED_HERE) {
  load_matrices_of<kCount, true>(r, row, PARED_WHERE);
}

// ---- wgmma and tensor maps

inline void copy_tensor(void* shared, const CUtensorMap* map, int column, int row, uint64_t* bar,
                        PARED_HERE) {
  emulate::copy_tensor(shared, *map, column, row, bar, PARED_WHERE);
}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulate::close_deferred(); }
template <int kInFlight>
void wgmma_wait() {
  emulate::run_deferred(kInFlight);
}
inline uint64_t wgmma_operand(const void* rows) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | shared_address(rows) >> 4;
}

// Byte `byte` of row `row` of an operand, by the fields of its descriptor and the swizzle of address bits.
inline unsigned char operand_byte(uint64_t descriptor, int row, int byte) {
  const uint64_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  const uint64_t at = start + row / 8 * eight_rows + row % 8 * 128 + byte;
  return emulate::dynamic_shared()[at ^ (at >> 3 & 0x70)];
}

template <int kN, class T>
struct WgmmaOperands {
  typename T::C (*c)[4];
  uint64_t a, b;
};
template <int kN, class T>
void wgmma(typename T::C (&c)[kN][4], uint64_t a, uint64_t b, emulate::Where where) {
  if (a >> 62 != 1 || b >> 62 != 1) emulate::fail("wgmma: expected operands swizzled by 128 bytes", where);
  // The swizzle goes by address bits: eight rows begin at 1024 bytes, steps inside the first row at 32.
  for (const uint64_t operand : {a, b})
    if (const uint64_t within = (operand << 4) & 1023; within >= 128 || within % 32)
      emulate::fail("wgmma: expected an operand at a multiple of 1024 bytes, and of 32 in its row", where);
  emulate::read_by_engine(a << 4 & 0x3fc00, 64 * 128, where);
  emulate::read_by_engine(b << 4 & 0x3fc00, 8 * kN * 128, where);
  emulate::defer([operands = WgmmaOperands<kN, T>{c, a, b}, where]() mutable {
    emulate::collective(
        T::kName, emulate::kFullWarp, &operands,
        [](void** all, uint32_t) {
          constexpr int n = T::kPerRegister, K = 8 * n;
          auto** lanes = reinterpret_cast<WgmmaOperands<kN, T>**>(all);
          const auto value = [&](uint64_t operand, int row, int k) {
            uint32_t word = 0;
            for (int i = 0; i < 4; ++i)
              word |= uint32_t{operand_byte(operand, row, k / n * 4 + i)} << (8 * i);
            return T::at(word, k % n);
          };
          const int warp_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
          typename T::Sum A[16][K], B[8 * kN][K];
          for (int k = 0; k < K; ++k) {
            for (int r = 0; r < 16; ++r) A[r][k] = value(lanes[0]->a, warp_row + r, k);
            for (int r = 0; r < 8 * kN; ++r) B[r][k] = value(lanes[0]->b, r, k);
          }
          for (int l = 0; l < 32; ++l)
            for (int j = 0; j < kN; ++j)
              for (int i = 0; i < 4; ++i) {
                const int row = l / 4 + i / 2 * 8, column = 8 * j + l % 4 * 2 + i % 2;
                typename T::Sum sum = lanes[l]->c[j][i];
                for (int k = 0; k < K; ++k) sum += A[row][k] * B[column][k];
                lanes[l]->c[j][i] = static_cast<typename T::C>(sum);
              }
        },
        where);
  });
}
template <int kN>
void wgmma_f16(float (&c)[kN][4], uint64_t a, uint64_t b, PARED_HERE) {
  wgmma<kN, F16>(c, a, b, PARED_WHERE);
}
template <int kN>
void wgmma_bf16(float (&c)[kN][4], uint64_t a, uint64_t b, PARED_HERE) {
  wgmma<kN, Bf16>(c, a, b, PARED_WHERE);
}
template <int kN>
void wgmma_s8(int32_t (&c)[kN][4], uint64_t a, uint64_t b, PARED_HERE) {
  wgmma<kN, S8>(c, a, b, PARED_WHERE);
}

}  // namespace pared::cuda::ptx
