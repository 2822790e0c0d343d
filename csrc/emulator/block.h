// The scheduler of one block: which fiber runs next, who waits for what, and what is an error.
// Internal to the emulator; kernels see runtime.h.
#pragma once

#include <array>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "emulator/control.h"
#include "emulator/fiber.h"
#include "emulator/ready_set.h"
#include "emulator/runtime.h"

namespace fused::emulator {

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
  void named_barrier(int id, int num_threads, bool waits, Site site);
  void collective(const char* name, unsigned mask, void* record, Combine combine, Site site);
  void begin_copy(const AsyncCopy& copy);
  void end_copy_group() { ++current().num_copy_groups; }
  bool take_due_copy(int num_pending, AsyncCopy* copy);
  [[noreturn]] void fail_in_current_thread(const char* what);

 private:
  enum class State : unsigned char {
    kNotStarted,
    kReady,
    kAtBarrier,
    kAtNamedBarrier,
    kAtCollective,
    kExited
  };

  struct Thread : ThreadView {
    State state;
    int stack;  // while it runs or waits
    Context context;
    Site site;  // what it waits at
    int barrier_id;
    const char* collective;
    unsigned mask;
    void* record;
    Combine combine;
    std::deque<std::pair<int, AsyncCopy>> copies;  // with their groups
    int num_copy_groups;
  };
  struct Warp {
    unsigned waiting, exited;  // lanes; a lane that the block has not got counts as exited
  };

  // Threads that came since it last let go, and lanes of each warp among them.
  struct NamedBarrier {
    int expected, arrived;
    std::array<unsigned, kMaxThreads / kWarpSize> lanes;
  };

  static void fiber_main();
  void reset_threads();
  void fill_shared_memory();
  void fill_static_shared_memory();
  void check_shared_memory_guard();
  void check_named_barriers();
  void suspend();
  void switch_to(Thread& next, Context& from, bool has_ended);
  void exit_current_thread();
  void complete_collective(Warp& warp, const Thread& self);
  void complete_named_barrier(int id, Site site);
  const Thread* first_in(State state) const;
  [[noreturn]] void fail_in_deadlock();
  [[noreturn]] void fail_at_named_barrier(const Thread& waiting);
  Thread& current() { return threads_[current_thread->rank]; }

  const Launch* launch_ = nullptr;
  Settings settings_;
  BlockView view_;
  int num_threads_ = 0, num_exited_ = 0, num_at_barrier_ = 0;
  BarrierResult pending_barrier_, barrier_result_;
  std::array<NamedBarrier, kNamedBarriers> named_barriers_;
  ReadySet ready_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Stacks stacks_;
  Context scheduler_;
  std::vector<unsigned char> shared_storage_;
  std::string error_;  // without the kernel and the block, which run() adds
};

}  // namespace fused::emulator
