// Small kernels that show what the emulator does, for tests/test_emulator.py: one function per case
// in the table at the end. Kernels named bad_ break a rule of CUDA on purpose.
#include <cstdio>
#include <cstring>
#include <string>

#include "common/launch.h"
#include "emulator/control.h"
#include "named_barrier_cases.cuh"

namespace fused::cases {

constexpr unsigned kAll = 0xffffffffu;

// ---- indices, barriers, shared memory ----

__global__ void indices_kernel(int* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      block * 1000 + threadIdx.x * 100 + threadIdx.y * 10 + threadIdx.z;
}

template <bool kWithBarrier>
__global__ void __launch_bounds__(64) reverse_kernel(int* out) {
  int* tile = shared_memory<int>();
  // A function of its own in the symbol table, and yet no instance of the kernel.
  const auto fill = [&](int value) __attribute__((noinline)) { tile[value] = value; };
  fill(int(threadIdx.x));
  if (kWithBarrier) __syncthreads();
  out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

__global__ void reducing_barriers_kernel(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int all = __syncthreads_and(threadIdx.x < 40);
  const int any = __syncthreads_or(threadIdx.x == 39);
  out[threadIdx.x] = count * 100 + all * 10 + any;
}

__global__ void static_shared_kernel(int* out) {
  __shared__ int tile[64];
  __shared__ int sum;
  tile[threadIdx.x] = int(threadIdx.x + blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int value : tile) sum += value;
  }
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = sum;
}

__global__ void fresh_static_shared_kernel(float* out) {
  __shared__ float tile[64];
  __shared__ double sum;
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x] + float(sum);
  __syncthreads();
  tile[threadIdx.x] = 1.0f;
  if (threadIdx.x == 0) sum = 1;
}

__global__ void fresh_shared_memory_kernel(float* out) {
  float* tile = shared_memory<float>();
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x];
  tile[threadIdx.x] = 1.0f;
}

// The place of each thread in the order in which the block's threads ran.
__global__ void order_kernel(int* out) { out[threadIdx.x] = atomicAdd(&out[blockDim.x], 1); }

// ---- warp collectives ----

__global__ void shuffles_kernel(int* out) {
  const int lane = int(threadIdx.x);
  out[lane] = __shfl_sync(kAll, lane, 5);
  out[32 + lane] = __shfl_sync(kAll, lane, 1, 8);
  out[64 + lane] = __shfl_up_sync(kAll, lane, 3, 16);
  out[96 + lane] = __shfl_down_sync(kAll, lane, 3, 16);
  out[128 + lane] = __shfl_xor_sync(kAll, lane, 9);
  out[160 + lane] = int(__shfl_xor_sync(kAll, double(lane) * (1LL << 40), 1) / (1LL << 40));
  out[192 + lane] = int(__shfl_xor_sync(kAll, (long long)lane << 40, 1) >> 40);
  out[224 + lane] = int(__shfl_xor_sync(kAll, float(lane), 2));
}

__global__ void votes_kernel(unsigned* out) {
  const int lane = int(threadIdx.x);
  out[lane] = __ballot_sync(kAll, lane % 5 == 0);
  out[32 + lane] = __any_sync(kAll, lane == 7) * 2 + __all_sync(kAll, lane < 32);
  out[64 + lane] = __match_any_sync(kAll, lane / 10);
  int predicate;
  out[96 + lane] = __match_all_sync(kAll, lane / 32, &predicate) + unsigned(predicate);
  out[128 + lane] = __reduce_add_sync(kAll, unsigned(lane));
  out[160 + lane] = unsigned(__reduce_min_sync(kAll, lane - 9));
  out[192 + lane] = __reduce_max_sync(kAll, unsigned(lane * 3));
  out[224 + lane] = __reduce_xor_sync(kAll, 1u << lane) - __reduce_and_sync(kAll, 7u | lane << 3);
}

// Each half of a warp for itself, under a mask of its own.
__global__ void masks_kernel(unsigned* out) {
  const int lane = int(threadIdx.x);
  const unsigned mask = lane % 2 ? 0xaaaaaaaau : 0x55555555u;
  const auto put = [&](int place, unsigned value) { out[place * 32 + lane] = value; };
  put(0, __reduce_add_sync(mask, unsigned(lane)));
  put(1, unsigned(__reduce_min_sync(mask, lane - 9)));
  put(2, __reduce_max_sync(mask, unsigned(lane)));
  put(3, __reduce_or_sync(mask, 1u << lane));
  put(4, __match_any_sync(mask, lane / 16));
  int predicate;
  put(5, __match_all_sync(mask, lane % 2, &predicate) ^ unsigned(predicate));
  put(6, __match_all_sync(mask, lane / 2, &predicate) ^ unsigned(predicate));
  put(7, __ballot_sync(mask, lane < 16));
}

// The halves of a warp go through different collectives, in a different order and number.
__global__ void halves_kernel(int* out) {
  const int lane = int(threadIdx.x);
  int value = lane;
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) value += __shfl_xor_sync(0x0000ffffu, value, 1 << i);
  } else {
    value += int(__ballot_sync(0xffff0000u, lane % 2) >> 28);
    __syncwarp(0xffff0000u);
    value += __shfl_sync(0xffff0000u, value, 31);
  }
  __syncwarp();
  out[lane] = value;
}

__global__ void atomics_kernel(int* out, float* sum, unsigned* wrap) {
  atomicAdd(&out[0], 1);
  atomicMax(&out[1], int(threadIdx.x + blockIdx.x));
  atomicMin(&out[2], int(threadIdx.x) - int(blockIdx.x));
  atomicOr(&out[3], 1 << threadIdx.x % 31);
  if (atomicCAS(&out[4], 0, 1) == 0) atomicExch(&out[5], 42);
  atomicAdd(sum, 0.5f);
  atomicInc(wrap, 6u);
}

__global__ void shared_atomics_kernel(int* out) {
  int* words = shared_memory<int>();
  if (threadIdx.x < 4) words[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&words[0], int(threadIdx.x));
  atomicXor(&words[1], 1 << threadIdx.x % 31);
  atomicMax(&words[2], int(threadIdx.x));
  atomicDec(reinterpret_cast<unsigned*>(&words[3]), 6u);
  __syncthreads();
  if (threadIdx.x < 4) out[blockIdx.x * 4 + threadIdx.x] = words[threadIdx.x];
}

// ---- what CUDA forbids ----

__global__ void bad_exit_before_barrier(int*) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}
__global__ void bad_divergent_barrier(int* out) {
  if (threadIdx.x < 3) {
    __syncthreads();
  } else {
    out[0] = 1;
    __syncthreads();
  }
}
__global__ void bad_barrier_against_shuffle(int* out) {
  if (threadIdx.x == 9) {
    out[0] = __shfl_sync(kAll, 1, 0);
  } else {
    __syncthreads();
  }
}
__global__ void bad_exited_lane(int* out) {
  if (threadIdx.x == 3) return;
  out[0] = __shfl_sync(kAll, 1, 2);
}
__global__ void bad_caller_not_in_mask(int* out) { out[0] = __shfl_sync(1u, 1, 0); }
__global__ void bad_lane_not_in_mask(int* out) {
  if (threadIdx.x < 8) out[0] = __shfl_sync(0xffu, 1, 8);
}
__global__ void bad_masks_differ(int* out) {
  out[0] = __shfl_sync(threadIdx.x < 16 ? kAll : 0xffff0001u, 1, 0);
}
__global__ void bad_collectives_differ(int* out) {
  if (threadIdx.x < 16) {
    out[0] = __shfl_xor_sync(kAll, 1, 1);
  } else {
    out[0] = __any_sync(kAll, 1);
  }
}
__global__ void bad_misaligned(float* out) {
  const float4 value = *reinterpret_cast<const float4*>(out + threadIdx.x);
  out[64 + threadIdx.x] = value.x;
}
__global__ void bad_index(int* out) {
  int local[4] = {1, 2, 3, 4};
  out[threadIdx.x] = local[out[64] + 4];
}
__global__ void bad_shared_write(int*) { shared_memory<int>()[threadIdx.x] = 1; }
__global__ void empty_kernel(int*) {}

// ---- what is a race and what is not, whatever the order ----

template <bool kWithBarrier>
__global__ void neighbour_kernel(int* out) {
  int* tile = shared_memory<int>();
  const unsigned thread = threadIdx.x;
  tile[thread] = int(thread);
  if (kWithBarrier) __syncwarp();
  // In forward order the right value is there without the barrier too.
  out[blockIdx.x * blockDim.x + thread] = tile[thread % 32 ? thread - 1 : thread];
}

// The second round of writes may overtake the first round of reads.
template <bool kWithBarrier>
__global__ void reused_tile_kernel(int* out) {
  int* tile = shared_memory<int>();
  const unsigned thread = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    tile[thread] = int(thread) + round;
    __syncthreads();
    out[thread] = tile[thread ^ 32];
    if (kWithBarrier) __syncthreads();
  }
}

__global__ void race_shuffle_is_no_barrier(int* out) {
  int* tile = shared_memory<int>();
  tile[threadIdx.x] = __shfl_xor_sync(kAll, int(threadIdx.x), 1);
  const int sum = __reduce_add_sync(kAll, 1);
  out[threadIdx.x] = tile[threadIdx.x ^ 1] + sum;
}

__global__ void race_between_blocks(int* out) { out[threadIdx.x] = int(blockIdx.x); }

__global__ void race_read_of_another_block(int* out) {
  out[blockIdx.x * 32 + threadIdx.x] = out[(1 - blockIdx.x) * 32 + threadIdx.x];
}

__global__ void race_atomic_against_plain(int* out) {
  if (threadIdx.x == 5) {
    out[0] = 1;
  } else {
    atomicAdd(&out[0], 1);
  }
}

// Two threads write one word, but not one byte.
__global__ void bytes_of_one_word_kernel(int* out) {
  reinterpret_cast<unsigned char*>(out)[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
}

// ---- the table ----

struct Case {
  const char* name;
  Status (*run)(void* out);
};

template <auto kKernel, unsigned kBlocks, unsigned kThreads, size_t kSharedBytes = 0, class T>
Status run_on(T* out) {
  return launch(kKernel, kBlocks, kThreads, kSharedBytes, nullptr, out);
}
#define FUSED_CASE(kernel, T, ...) \
  {#kernel, [](void* out) { return run_on<kernel, __VA_ARGS__>(static_cast<T*>(out)); }}

const Case kCases[] = {
    {"indices_kernel",
     [](void* out) {
       return launch(indices_kernel, dim3(2, 3, 2), dim3(4, 2, 3), 0, nullptr,
                     static_cast<int*>(out));
     }},
    {"atomics_kernel",
     [](void* out) {
       auto* words = static_cast<int*>(out);
       return launch(atomics_kernel, 50, 64, 0, nullptr, words, reinterpret_cast<float*>(words + 6),
                     reinterpret_cast<unsigned*>(words + 7));
     }},
    FUSED_CASE(reverse_kernel<true>, int, 1, 64, 256),
    FUSED_CASE(reverse_kernel<false>, int, 1, 64, 256),
    FUSED_CASE(reducing_barriers_kernel, int, 1, 64),
    FUSED_CASE(pairs_of_warps_kernel<true>, int, 1, 128, 512),
    FUSED_CASE(pairs_of_warps_kernel<false>, int, 1, 128, 512),
    FUSED_CASE(producer_kernel, int, 1, 96, 128),
    FUSED_CASE(race_after_arrival, int, 1, 64, 128),
    FUSED_CASE(static_shared_kernel, int, 8, 64),
    FUSED_CASE(fresh_static_shared_kernel, float, 8, 64),
    FUSED_CASE(fresh_shared_memory_kernel, float, 8, 64, 256),
    FUSED_CASE(order_kernel, int, 1, 100),
    FUSED_CASE(shuffles_kernel, int, 1, 32),
    FUSED_CASE(votes_kernel, unsigned, 1, 32),
    FUSED_CASE(masks_kernel, unsigned, 1, 32),
    FUSED_CASE(halves_kernel, int, 1, 32),
    FUSED_CASE(shared_atomics_kernel, int, 3, 64, 16),
    FUSED_CASE(bad_exit_before_barrier, int, 1, 64),
    FUSED_CASE(bad_divergent_barrier, int, 1, 64),
    FUSED_CASE(bad_barrier_against_shuffle, int, 1, 64),
    FUSED_CASE(bad_named_barrier_of_too_few, int, 1, 64),
    FUSED_CASE(bad_named_barrier_of_an_odd_count, int, 1, 64),
    FUSED_CASE(bad_named_barrier_zero, int, 1, 64),
    FUSED_CASE(bad_named_barrier_of_two_counts, int, 1, 128),
    FUSED_CASE(bad_named_barrier_of_half_warps, int, 1, 64),
    FUSED_CASE(bad_named_barrier_that_nobody_waits_at, int, 1, 64),
    FUSED_CASE(bad_named_barrier_twice, int, 1, 64),
    FUSED_CASE(bad_exited_lane, int, 1, 64),
    FUSED_CASE(bad_caller_not_in_mask, int, 1, 64),
    FUSED_CASE(bad_lane_not_in_mask, int, 1, 64),
    FUSED_CASE(bad_masks_differ, int, 1, 32),
    FUSED_CASE(bad_collectives_differ, int, 1, 32),
    FUSED_CASE(bad_misaligned, float, 1, 32),
    FUSED_CASE(bad_index, int, 1, 32),
    FUSED_CASE(bad_shared_write, int, 1, 32, 64),
    FUSED_CASE(neighbour_kernel<true>, int, 3, 64, 256),
    FUSED_CASE(neighbour_kernel<false>, int, 1, 64, 256),
    FUSED_CASE(reused_tile_kernel<true>, int, 1, 64, 256),
    FUSED_CASE(reused_tile_kernel<false>, int, 1, 64, 256),
    FUSED_CASE(race_shuffle_is_no_barrier, int, 1, 32, 256),
    FUSED_CASE(race_between_blocks, int, 2, 32),
    FUSED_CASE(race_read_of_another_block, int, 2, 32),
    FUSED_CASE(race_atomic_against_plain, int, 1, 32),
    FUSED_CASE(bytes_of_one_word_kernel, int, 1, 64),
    {"too many threads", [](void* out) { return run_on<empty_kernel, 1, 1025>((int*)out); }},
    {"too much shared memory",
     [](void* out) { return run_on<empty_kernel, 1, 32, 70000>((int*)out); }},
    {"too much shared memory, part of it static",
     [](void* out) { return run_on<static_shared_kernel, 1, 32, 65536 - 259>((int*)out); }},
    {"no blocks", [](void* out) { return run_on<bad_exit_before_barrier, 0, 32>((int*)out); }},
    {"too many rows",
     [](void* out) { return launch(empty_kernel, dim3(1, 65536), 1, 0, nullptr, (int*)out); }},
};

}  // namespace fused::cases

// For ctypes. The status, or "no such case".
extern "C" FUSED_API const char* run_case(const char* name, int order, unsigned long seed,
                                          int num_os_threads, void* out) {
  using namespace fused;
  emulator::set_settings({emulator::Order(order), seed, 64 * 1024, num_os_threads, 80});
  for (const auto& one : cases::kCases) {
    if (std::strcmp(one.name, name) == 0) return one.run(out);
  }
  return "no such case";
}

// The kernels launched so far, as lines of "name count".
extern "C" FUSED_API const char* launch_log() {
  static std::string text;
  text.clear();
  for (const auto& [name, count] : fused::emulator::launch_counts()) {
    text += name + " " + std::to_string(count) + "\n";
  }
  return text.c_str();
}

// The instances of a kernel template, one a line.
extern "C" FUSED_API const char* instances(const char* name) {
  static std::string text;
  text.clear();
  for (const auto& instance : fused::emulator::instances_of({name})) text += instance + "\n";
  return text.c_str();
}
