// Every PTX instruction of the project, one thin wrapper each: the instruction and no policy. In
// the emulator the same names are warp collectives that follow the documented fragment layouts
// (emulator/ptx.h); layouts are given here once, for both.
//
// Lane l of a warp is in group g = l / 4 with place t = l % 4. A register of 16-bit elements holds
// two neighbours, the first in its low half.
//
//   mma m16n8k16, 16-bit   A [16, 16]  a[0]: (g, 2t)  a[1]: (g + 8, 2t)  a[2]: (g, 2t + 8)
//                                      a[3]: (g + 8, 2t + 8), and the next column each
//                          B [16, 8]   b[0]: (2t, g)  b[1]: (2t + 8, g), and the next row each
//   mma m16n8k8, tf32      A [16, 8]   a[0]: (g, t)  a[1]: (g + 8, t)  a[2]: (g, t + 4)
//                                      a[3]: (g + 8, t + 4)
//                          B [8, 8]    b[0]: (t, g)  b[1]: (t + 4, g)
//   both                   C, D [16, 8] float  d[0], d[1]: (g, 2t), (g, 2t + 1)
//                                              d[2], d[3]: (g + 8, 2t), (g + 8, 2t + 1)
//   ldmatrix, stmatrix     8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8
//   of
//                          matrix l / 8 and holds of each matrix row g, columns 2t and 2t + 1; with
//                          transposition column g, rows 2t and 2t + 1
//
// PTX ISA: "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8", "ldmatrix", "stmatrix",
// "cp.async", "bar", "ex2", "cvt".
#pragma once

#include <cstdint>

#include "common/simt.h"

#ifdef FUSED_EMULATED

#include "emulator/ptx.h"

namespace fused::ptx {
using emulator::barrier_arrive;
using emulator::barrier_sync;
using emulator::cp_async_16;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::exp2_approx;
constexpr int kArchitecture = 80;  // the emulator has every instruction in here
using emulator::ldmatrix;
using emulator::mma_m16n8k16_bf16;
using emulator::mma_m16n8k16_f16;
using emulator::mma_m16n8k8_tf32;
using emulator::round_to_tf32;
using emulator::stmatrix;
}  // namespace fused::ptx

#else

namespace fused::ptx {

// What this pass of the compiler makes code for, times ten: a kernel whose instructions it lacks
// has no body there.
#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 80;  // the host's pass
#endif

// 2^x to two units in the last place; results below the normal numbers are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The nearest float of 10 bits behind the point, of two the one further from 0; beyond the largest
// an infinity. Infinities stay, and NaN.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- tensor cores: d = a b + c (sm_80) ----

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// The bits of floats; the low 13 of each are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// ---- four 8 x 8 matrices between shared memory and fragments (sm_75; stmatrix sm_90) ----

template <bool kTransposed>
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

template <bool kTransposed>
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&fragment)[4]) {
  if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     shared_address(row)),
                 "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
  } else {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
        "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
        : "memory");
  }
}

// ---- copies from global to shared memory past the registers (sm_80) ----

// Copies the first source_bytes of 16 and zeros behind them; both addresses on 16 bytes.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global,
                                            int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(source_bytes)
               : "memory");
}

// Ends a group: the thread's copies since the group before.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most kPending of the thread's latest groups are under way. The copies are then
// visible to the thread; others need a barrier besides.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- named barriers: some warps of a block among themselves ----

// id 1 to 15 (__syncthreads has 0); num_threads, a multiple of 32, counts those that wait and those
// that only arrive. All lanes of a warp come together.
__device__ __forceinline__ void barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Does not wait: what the thread wrote before is visible to those that wait, once they go on.
__device__ __forceinline__ void barrier_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

}  // namespace fused::ptx

#endif
