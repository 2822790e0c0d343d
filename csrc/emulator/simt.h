// CUDA's language on a CPU: what kernel source sees in place of cuda_runtime.h when g++ compiles it
// with -DFUSED_EMULATED. docs/emulator.md says what is modelled and what is not.
//
//   runtime.h       one block: its threads, barriers, warp collectives, shared memory; launch()
//   vector_types.h  float4 and its kin
//   warp.h          shuffles, votes, match, reduce: collectives over a warp's lanes
//   device_math.h   atomics, cache-hinted loads, intrinsics
#pragma once

#pragma GCC diagnostic ignored "-Wunknown-pragmas"  // #pragma unroll

#define __host__
#define __device__
#define __global__ __attribute__((noinline, no_icf))  // one symbol per kernel: the log reads names
#define __constant__
#define __shared__ static thread_local  // a block runs on one OS thread from its start to its end
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// clang-format off: each needs those above it
#include "emulator/vector_types.h"
#include "emulator/runtime.h"
#include "emulator/warp.h"
#include "emulator/device_math.h"
// clang-format on

#define threadIdx (::fused::emulator::current_thread->index)
#define blockIdx (::fused::emulator::current_block->index)
#define blockDim (::fused::emulator::current_block->dim)
#define gridDim (::fused::emulator::current_block->grid_dim)
constexpr int warpSize = 32;
