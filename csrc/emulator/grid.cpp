// A launch: checks what the driver would refuse, then deals the blocks out to OS threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "emulator/block.h"
#include "emulator/control.h"
#include "emulator/races.h"

namespace fused::emulator {
namespace {

// Below so many CUDA threads a launch ends sooner than a second OS thread would start.
constexpr uint64_t kThreadsWorthAnOsThread = 1024;

thread_local std::string last_error;

Status failed(const std::string& text) {
  last_error = text;
  return last_error.c_str();
}

// Runners keep their stacks between launches. Borrowed, and not one per OS thread, because the OS
// threads of a launch end with it.
class RunnerPool {
 public:
  std::unique_ptr<BlockRunner> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (runners_.empty()) return std::make_unique<BlockRunner>();
    auto runner = std::move(runners_.back());
    runners_.pop_back();
    return runner;
  }
  void give_back(std::unique_ptr<BlockRunner> runner) {
    const std::lock_guard<std::mutex> lock(mutex_);
    runners_.push_back(std::move(runner));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<BlockRunner>> runners_;
};

RunnerPool& runner_pool() {
  static RunnerPool* const pool = new RunnerPool;  // outlives the exit handlers of others
  return *pool;
}

std::string refusal(const Launch& launch, const Settings& settings) {
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return "a block must have 1 to 1024 threads, at most 64 in z, got (" + std::to_string(block.x) +
           ", " + std::to_string(block.y) + ", " + std::to_string(block.z) + ")";
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return "a grid must have at most (2147483647, 65535, 65535) blocks, got (" +
           std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
           ")";
  }
  if (launch.architecture > settings.architecture) {
    return "a kernel for sm_" + std::to_string(launch.architecture) + " on a device of sm_" +
           std::to_string(settings.architecture);
  }
  const size_t limit =
      settings.shared_limit != 0 ? settings.shared_limit : kernel_shared_limit(launch.architecture);
  const size_t bytes = launch.shared_bytes + kernel_at(launch.kernel).static_shared_bytes();
  if (bytes > limit) {
    return "a block may have " + std::to_string(limit) + " bytes of shared memory, asked for " +
           std::to_string(bytes);
  }
  return "";
}

// The blocks of one launch, in the order in which they start.
class Grid {
 public:
  Grid(const Launch& launch, const Settings& settings)
      : launch_(launch),
        settings_(settings),
        num_blocks_(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z) {
    if (settings.order != Order::kRandom) return;
    shuffled_.resize(num_blocks_);
    std::iota(shuffled_.begin(), shuffled_.end(), 0);
    std::shuffle(shuffled_.begin(), shuffled_.end(), std::mt19937_64(settings.seed));
  }

  // Takes blocks until none is left or one has failed. Called by every OS thread of the launch.
  void work() {
    auto runner = runner_pool().take();
    for (uint64_t turn = next_++; turn < num_blocks_; turn = next_++) {
      const uint64_t rank = rank_at(turn);
      std::string error = runner->run(launch_, index_of(rank), rank, settings_);
      if (!error.empty()) note(rank, std::move(error));
    }
    runner_pool().give_back(std::move(runner));
  }

  const std::string& error() const { return error_; }

 private:
  uint64_t rank_at(uint64_t turn) const {
    switch (settings_.order) {
      case Order::kForward:
        return turn;
      case Order::kReverse:
        return num_blocks_ - 1 - turn;
      case Order::kRandom:
        return shuffled_[turn];
    }
    __builtin_unreachable();
  }
  dim3 index_of(uint64_t rank) const {
    const dim3 grid = launch_.grid;
    return {unsigned(rank % grid.x), unsigned(rank / grid.x % grid.y),
            unsigned(rank / grid.x / grid.y)};
  }
  // Starts no further block, and keeps the error of the lowest block: those that start before it in
  // any order may still be running, but the text does not depend on who wins.
  void note(uint64_t rank, std::string error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    next_ = num_blocks_;
    if (!error_.empty() && rank > error_rank_) return;
    error_ = std::move(error);
    error_rank_ = rank;
  }

  const Launch& launch_;
  const Settings settings_;
  const uint64_t num_blocks_;
  std::vector<uint64_t> shuffled_;
  std::atomic<uint64_t> next_{0};
  std::mutex mutex_;
  std::string error_;
  uint64_t error_rank_ = 0;
};

// OS threads that a launch is worth.
uint64_t num_workers(const Launch& launch, const Settings& settings) {
  if (kDetectRaces) return 1;
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const uint64_t threads = blocks * launch.block.x * launch.block.y * launch.block.z;
  return std::min(
      {uint64_t(settings.num_os_threads), blocks, 1 + threads / kThreadsWorthAnOsThread});
}

}  // namespace

Status run(const Launch& launch) {
  if (current_block) return failed(kernel_name(launch.kernel) + ": launched from within a kernel");
  const Settings now = settings();
  const std::string refused = refusal(launch, now);
  if (!refused.empty()) return failed(kernel_name(launch.kernel) + ": " + refused);
  count_launch(launch.kernel);

  // One record of accesses for all, so that launches and blocks come one after the other then.
  static std::mutex one_at_a_time;
  std::unique_lock<std::mutex> lock(one_at_a_time, std::defer_lock);
  if (kDetectRaces) lock.lock();
  races_begin_launch();

  Grid grid(launch, now);
  std::vector<std::thread> os_threads;
  for (uint64_t i = 1; i < num_workers(launch, now); ++i) {
    os_threads.emplace_back([&] { grid.work(); });
  }
  grid.work();
  for (auto& thread : os_threads) thread.join();
  return grid.error().empty() ? nullptr : failed(grid.error());
}

}  // namespace fused::emulator
