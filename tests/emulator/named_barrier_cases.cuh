// Kernels with named barriers, for the table in cases.cu.
#pragma once

#include "common/launch.h"
#include "common/ptx.h"

namespace fused::cases {

// Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2.
template <bool kWithBarrier>
__global__ void pairs_of_warps_kernel(int* out) {
  int* tile = shared_memory<int>();
  const int thread = int(threadIdx.x);
  tile[thread] = thread;
  if (kWithBarrier) ptx::barrier_sync(1 + thread / 64, 64);
  out[thread] = tile[thread ^ 32];
}

// Warp 0 fills a tile for warps 1 and 2, and goes on without waiting for them to have read it;
// before it fills the tile again it does wait.
__global__ void producer_kernel(int* out) {
  int* tile = shared_memory<int>();
  const int thread = int(threadIdx.x), lane = thread % 32;
  enum { kFull = 3, kEmpty = 15 };
  for (int round = 0; round < 3; ++round) {
    if (thread < 32) {
      if (round > 0) ptx::barrier_sync(kEmpty, 96);
      tile[lane] = 100 * round + lane;
      ptx::barrier_arrive(kFull, 96);
    } else {
      ptx::barrier_sync(kFull, 96);
      out[round * 64 + thread - 32] = tile[lane ^ 1];
      if (round < 2) ptx::barrier_arrive(kEmpty, 96);
    }
  }
}

// ---- what is forbidden ----

__global__ void bad_named_barrier_of_too_few(int*) {
  if (threadIdx.x < 32) ptx::barrier_sync(1, 64);
}
__global__ void bad_named_barrier_of_an_odd_count(int*) { ptx::barrier_sync(1, 48); }
__global__ void bad_named_barrier_zero(int*) { ptx::barrier_sync(0, 64); }
__global__ void bad_named_barrier_of_two_counts(int*) {
  if (threadIdx.x < 64) ptx::barrier_sync(1, threadIdx.x < 32 ? 96 : 128);
}
__global__ void bad_named_barrier_of_half_warps(int*) {
  if (threadIdx.x % 32 < 16) ptx::barrier_sync(1, 32);
}
__global__ void bad_named_barrier_that_nobody_waits_at(int*) {
  if (threadIdx.x < 32) ptx::barrier_arrive(1, 64);
}
__global__ void bad_named_barrier_twice(int*) {
  ptx::barrier_arrive(1, 64);
  ptx::barrier_arrive(1, 64);
}

// ---- a race ----

__global__ void race_after_arrival(int* out) {
  int* tile = shared_memory<int>();
  if (threadIdx.x < 32) {
    tile[threadIdx.x] = 1;
    ptx::barrier_arrive(1, 64);
    tile[threadIdx.x] = 2;
  } else {
    ptx::barrier_sync(1, 64);
    out[threadIdx.x] = tile[threadIdx.x - 32];
  }
}

}  // namespace fused::cases
