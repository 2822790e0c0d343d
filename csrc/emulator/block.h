// The scheduler of one block: which fiber runs next, who waits for what, and what is an error.
// Internal to the emulator; kernels see runtime.h.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "emulator/control.h"
#include "emulator/fiber.h"
#include "emulator/runtime.h"

namespace fused::emulator {

// The next of at most 1024 threads to run, in the chosen order.
class ReadySet {
 public:
  void reset(Order order, uint64_t seed, int num_threads);
  void insert(int thread) { words_[thread / 64] |= uint64_t(1) << thread % 64; }
  int take();  // -1 when nobody is ready

 private:
  int first_from(int thread) const;  // lowest member >= thread, or -1
  int last_to(int thread) const;     // highest member <= thread, or -1

  std::array<uint64_t, kMaxThreads / 64> words_;
  Order order_;
  uint64_t random_state_;
  int num_threads_, last_taken_;
};

// Runs blocks one after the other, on the OS thread that calls it; keeps its stacks and its shared
// memory from launch to launch.
class BlockRunner {
 public:
  BlockRunner();

  // The error of the block, or an empty string.
  std::string run(const Launch& launch, dim3 block_index, uint64_t block_rank,
                  const Settings& settings);

  // Called on the fibers of the running block.
  BarrierResult barrier(bool predicate, Site site);
  void collective(const char* name, unsigned mask, void* record, Combine combine, Site site);
  [[noreturn]] void fail_in_current_thread(const std::string& what);

 private:
  enum class State : unsigned char { kNotStarted, kReady, kAtBarrier, kAtCollective, kExited };

  struct Thread : ThreadView {
    State state;
    std::unique_ptr<Stack> const* stack;  // in stacks_; null before it starts and after it exits
    void* stack_pointer;                  // where it was suspended
    Site site;                            // what it waits at
    const char* collective;
    unsigned mask;
    void* record;
    Combine combine;
  };
  struct Warp {
    unsigned waiting, exited;  // lanes; a lane that the block has not got counts as exited
  };

  static void fiber_main();
  void reset_threads();
  void fill_shared_memory();
  void check_shared_memory_guard();
  void suspend();
  void enter(Thread& next, void** save);
  void exit_current_thread();
  void complete_collective(Warp& warp, const Thread& self);
  [[noreturn]] void fail_in_deadlock();
  Thread& current() { return threads_[current_thread->rank]; }
  std::string name_of(const Thread& thread) const;

  const Launch* launch_ = nullptr;
  Settings settings_;
  BlockView view_;
  int num_threads_ = 0, num_exited_ = 0, num_at_barrier_ = 0;
  BarrierResult pending_barrier_, barrier_result_;
  ReadySet ready_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<std::unique_ptr<Stack> const*> free_stacks_;
  void* scheduler_stack_pointer_ = nullptr;
  std::vector<unsigned char> shared_storage_;
  std::string error_;
};

}  // namespace fused::emulator
