// One block of CUDA threads on one OS thread: every CUDA thread is a fiber, and a fiber runs until
// it waits (barrier, warp collective) or returns. Kernel source reaches this through simt.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <utility>

#include "common/status.h"
#include "emulator/vector_types.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

namespace fused::emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

// Where in kernel source something was called, for error messages. A default argument of this
// form is evaluated at the call.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

// What kernel code reads of the thread and the block that it runs in.
struct ThreadView {
  uint3 index;    // threadIdx
  unsigned rank;  // x fastest, as CUDA numbers the threads of a block into warps
};
struct BlockView {
  uint3 index;  // blockIdx
  dim3 dim, grid_dim;
  unsigned char* shared;
  size_t shared_bytes;
};

// Set by the scheduler at every switch. __thread and not thread_local: no initialisation wrapper,
// and one load through the static TLS block even in a library opened at run time.
#define FUSED_TLS __attribute__((visibility("hidden"), tls_model("initial-exec"))) __thread
extern FUSED_TLS const ThreadView* current_thread;
extern FUSED_TLS const BlockView* current_block;
#undef FUSED_TLS

inline unsigned lane_id() { return current_thread->rank % kWarpSize; }
inline unsigned char* dynamic_shared_memory() { return current_block->shared; }

// Abandons the launch: the text, with kernel, block and thread before it, becomes its status.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits until every thread of the block is at the same barrier; what the block's predicates gave.
struct BarrierResult {
  int count;  // threads whose predicate held
  bool all, any;
};
BarrierResult block_barrier(bool predicate, Site site);

// Barrier 1 to 15 of the block: goes on, or waits until num_threads threads of whole warps came.
constexpr int kNamedBarriers = 16;
void named_barrier(int id, int num_threads, bool waits, Site site);

// A warp collective. Each lane of the mask brings its own record, the last one to come runs
// combine over all of them (records of lanes outside the mask are nullptr), then all go on.
// combine returns what is wrong with the call, or nullptr. With one function per instruction, any
// warp-wide instruction is a loop over 32 records.
using Combine = const char* (*)(void* const* records, unsigned mask);
void warp_collective(const char* name, unsigned mask, void* record, Combine combine, Site site);

// The copies that the calling thread has begun by cp.async and not waited for, in groups.
struct AsyncCopy {
  void* destination;
  const void* source;
  int source_bytes;
};
void begin_copy(const AsyncCopy& copy);
void end_copy_group();
// The oldest copy that is due when num_pending groups may go on, taken out; or false.
bool take_due_copy(int num_pending, AsyncCopy* copy);

// A kernel with its arguments bound, its types forgotten.
struct Launch {
  const void* kernel;
  void (*run_thread)(const Launch&);
  const void* values;
  dim3 grid, block;
  size_t shared_bytes;
  int architecture;  // that the kernel is for
};
Status run(const Launch& launch);

// Runs what makes a launch, or keeps it for later: see capture.h.
Status submit(std::function<Status()> launch);

template <class... P>
Status launch(int architecture, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
              const std::tuple<std::decay_t<P>...>& values) {
  const auto run_thread = [](const Launch& launch) {
    using Values = std::tuple<std::decay_t<P>...>;
    std::apply(reinterpret_cast<void (*)(P...)>(const_cast<void*>(launch.kernel)),
               *static_cast<const Values*>(launch.values));
  };
  return submit([=] {
    return run({reinterpret_cast<const void*>(kernel), run_thread, &values, grid, block,
                shared_bytes, architecture});
  });
}

// Of the emulated device, times ten.
int architecture();

}  // namespace fused::emulator

inline void __syncthreads(fused::emulator::Site site = fused::emulator::here()) {
  fused::emulator::block_barrier(false, site);
}
inline int __syncthreads_count(int p, fused::emulator::Site site = fused::emulator::here()) {
  return fused::emulator::block_barrier(p != 0, site).count;
}
inline int __syncthreads_and(int p, fused::emulator::Site site = fused::emulator::here()) {
  return fused::emulator::block_barrier(p != 0, site).all;
}
inline int __syncthreads_or(int p, fused::emulator::Site site = fused::emulator::here()) {
  return fused::emulator::block_barrier(p != 0, site).any;
}
