#include "emulator/block.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "emulator/races.h"
#include "emulator/text.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fused::emulator {

__thread const ThreadView* current_thread = nullptr;
__thread const BlockView* current_block = nullptr;

namespace {

__thread BlockRunner* current_runner = nullptr;

constexpr size_t kSharedAlignment = 1024;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xa5;
constexpr unsigned char kUndefined = 0xff;  // NaN in every floating type, and no valid index

}  // namespace

// ---- a block from start to end ----

BlockRunner::BlockRunner()
    : threads_(kMaxThreads), warps_(kMaxThreads / kWarpSize), stacks_(kMaxThreads) {}

std::string BlockRunner::run(const Launch& launch, dim3 block_index, uint64_t block_rank,
                             const Settings& settings) {
  launch_ = &launch;
  settings_ = settings;
  view_ = {block_index, launch.block, launch.grid, nullptr, launch.shared_bytes};
  num_threads_ = int(launch.block.x * launch.block.y * launch.block.z);
  error_.clear();
  ready_.reset(settings.order, settings.seed, block_rank, num_threads_);
  reset_threads();
  fill_shared_memory();
  fill_static_shared_memory();
  races_begin_block(stacks_, launch.shared_bytes, block_rank);

  BlockRunner* const outer_runner = current_runner;
  const BlockView* const outer_block = current_block;
  current_runner = this;
  current_block = &view_;
  switch_to(threads_[ready_.take()], scheduler_, false);
  if (error_.empty()) check_shared_memory_guard();
  if (error_.empty()) check_named_barriers();
  current_thread = nullptr;
  current_block = outer_block;
  current_runner = outer_runner;
  if (error_.empty()) return error_;
  return kernel_name(launch.kernel) + ": block " + text_of(view_.index).chars + error_;
}

void BlockRunner::reset_threads() {
  num_exited_ = num_at_barrier_ = 0;
  pending_barrier_ = {0, true, false};
  for (NamedBarrier& barrier : named_barriers_) barrier = {};
  stacks_.take_back_all();  // an abandoned launch never gave them back
  const dim3 dim = launch_->block;
  int rank = 0;
  for (unsigned z = 0; z < dim.z; ++z) {
    for (unsigned y = 0; y < dim.y; ++y) {
      for (unsigned x = 0; x < dim.x; ++x, ++rank) {
        Thread& thread = threads_[rank];
        thread.index = {x, y, z};
        thread.rank = unsigned(rank);
        thread.copies.clear();
        thread.num_copy_groups = 0;
        thread.state = State::kNotStarted;
        ready_.insert(rank);
      }
    }
  }
  for (int first = 0; first < num_threads_; first += kWarpSize) {
    const int lanes = num_threads_ - first;
    warps_[first / kWarpSize] = {0, lanes >= kWarpSize ? 0 : ~0u << lanes};
  }
}

void BlockRunner::fill_shared_memory() {
  const size_t bytes = launch_->shared_bytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(shared_storage_.data(), shared_storage_.size());
#endif
  shared_storage_.resize(kSharedAlignment + bytes + kGuardBytes);
  const auto address = reinterpret_cast<uintptr_t>(shared_storage_.data());
  view_.shared =
      shared_storage_.data() + (kSharedAlignment - address % kSharedAlignment) % kSharedAlignment;
  std::memset(view_.shared, kUndefined, bytes);
  std::memset(view_.shared + bytes, kGuard, kGuardBytes);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(view_.shared + bytes, kGuardBytes);
#endif
}

void BlockRunner::fill_static_shared_memory() {
  const std::vector<Range>& variables = kernel_at(launch_->kernel).static_shared;
  if (variables.empty()) return;
  const uintptr_t begin = this_threads_variables().begin;
  for (const Range& variable : variables) {
    std::memset(reinterpret_cast<void*>(begin + variable.begin), kUndefined, variable.size);
  }
}

void BlockRunner::check_shared_memory_guard() {
#ifdef __SANITIZE_ADDRESS__
  return;  // it would have said so
#endif
  const unsigned char* guard = view_.shared + launch_->shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] == kGuard) continue;
    error_ = ": wrote byte " + std::to_string(launch_->shared_bytes + i) +
             " of its shared memory, which has " + std::to_string(launch_->shared_bytes);
    return;
  }
}

// ---- fibers ----

void BlockRunner::switch_to(Thread& next, Context& from, bool has_ended) {
  if (next.state == State::kNotStarted) {
    next.stack = stacks_.take();
    next.context.prepare(stacks_, next.stack, fiber_main);
  }
  next.state = State::kReady;
  current_thread = &next;
  from.switch_to(next.context, has_ended);
}

void BlockRunner::fiber_main() {
  Context::arrive();
  BlockRunner& runner = *current_runner;
  for (;;) {
    runner.launch_->run_thread(*runner.launch_);
    runner.exit_current_thread();
    Thread& done = runner.current();
    if (runner.num_exited_ == runner.num_threads_) done.context.switch_to(runner.scheduler_, true);
    const int next = runner.ready_.take();
    if (next < 0) runner.fail_in_deadlock();
    Thread& thread = runner.threads_[next];
    if (thread.state == State::kNotStarted) {
      // A thread that never waited leaves a warm stack for the next one to start on.
      thread.stack = done.stack;
      thread.context = done.context;
      thread.state = State::kReady;
      current_thread = &thread;
    } else {
      runner.stacks_.give_back(done.stack);
      runner.switch_to(thread, done.context, true);
    }
  }
}

void BlockRunner::suspend() {
  Thread& self = current();
  const int next = ready_.take();
  if (next < 0) fail_in_deadlock();
  switch_to(threads_[next], self.context, false);
}

void BlockRunner::exit_current_thread() {
  Thread& self = current();
  self.state = State::kExited;
  ++num_exited_;
  Warp& warp = warps_[self.rank / kWarpSize];
  warp.exited |= 1u << self.rank % kWarpSize;
}

// ---- waiting ----

BarrierResult BlockRunner::barrier(bool predicate, Site site) {
  Thread& self = current();
  for (int i = 0; num_at_barrier_ > 0 && i < num_threads_; ++i) {
    const Thread& other = threads_[i];
    if (other.state != State::kAtBarrier) continue;
    if (other.site.line != site.line || std::strcmp(other.site.file, site.file) != 0) {
      fail("__syncthreads at %s, while thread %s waits at the one at %s", text_of(site).chars,
           text_of(other.index).chars, text_of(other.site).chars);
    }
    break;  // the others were compared with this one when they came
  }
  pending_barrier_.count += predicate;
  pending_barrier_.all &= predicate;
  pending_barrier_.any |= predicate;
  self.state = State::kAtBarrier;
  self.site = site;
  if (++num_at_barrier_ < num_threads_) {
    suspend();
    return barrier_result_;
  }
  races_at_barrier();
  barrier_result_ = pending_barrier_;
  pending_barrier_ = {0, true, false};
  num_at_barrier_ = 0;
  for (int i = 0; i < num_threads_; ++i) {
    threads_[i].state = State::kReady;
    if (i != int(self.rank)) ready_.insert(i);
  }
  return barrier_result_;
}

void BlockRunner::collective(const char* name, unsigned mask, void* record, Combine combine,
                             Site site) {
  Thread& self = current();
  Warp& warp = warps_[self.rank / kWarpSize];
  const unsigned lane = self.rank % kWarpSize;
  self.site = site;
  self.collective = name;
  self.mask = mask;
  self.record = record;
  self.combine = combine;
  if (!(mask >> lane & 1)) {
    fail("%s at %s: mask %08x does not name the calling lane %u", name, text_of(site).chars, mask,
         lane);
  }
  if (mask & warp.exited) {
    fail("%s at %s: mask %08x names lane %d, which has exited or is not part of the block", name,
         text_of(site).chars, mask, __builtin_ctz(mask & warp.exited));
  }
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) == mask) {
    complete_collective(warp, self);
  } else {
    self.state = State::kAtCollective;
    suspend();
  }
}

void BlockRunner::complete_collective(Warp& warp, const Thread& self) {
  Thread* const lanes = &threads_[self.rank / kWarpSize * kWarpSize];
  void* records[kWarpSize] = {};
  for (unsigned rest = self.mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Thread& other = lanes[lane];
    if (other.mask != self.mask || other.combine != self.combine ||
        other.collective != self.collective) {
      fail("%s at %s with mask %08x, while lane %d waits in %s at %s with mask %08x",
           self.collective, text_of(self.site).chars, self.mask, lane, other.collective,
           text_of(other.site).chars, other.mask);
    }
    records[lane] = other.record;
  }
  if (!self.combine) {
    races_at_warp_barrier(self.rank / kWarpSize, self.mask);
  } else {
    const char* wrong = self.combine(records, self.mask);
    if (wrong) {
      fail("%s at %s with mask %08x: %s", self.collective, text_of(self.site).chars, self.mask,
           wrong);
    }
  }
  warp.waiting &= ~self.mask;
  for (unsigned rest = self.mask; rest; rest &= rest - 1) {
    Thread& other = lanes[__builtin_ctz(rest)];
    if (&other == &self) continue;
    other.state = State::kReady;
    ready_.insert(int(other.rank));
  }
}

void BlockRunner::begin_copy(const AsyncCopy& copy) {
  current().copies.emplace_back(current().num_copy_groups, copy);
}

bool BlockRunner::take_due_copy(int num_pending, AsyncCopy* copy) {
  Thread& self = current();
  if (self.copies.empty()) return false;
  if (self.copies.front().first >= self.num_copy_groups - num_pending) return false;
  *copy = self.copies.front().second;
  self.copies.pop_front();
  return true;
}

// ---- errors ----

void BlockRunner::fail_in_current_thread(const char* what) {
  char text[1280];
  std::snprintf(text, sizeof text, ", thread %s: %s", text_of(current().index).chars, what);
  error_ = text;
  current().context.switch_to(scheduler_, true);
  __builtin_unreachable();
}

const BlockRunner::Thread* BlockRunner::first_in(State state) const {
  for (int i = 0; i < num_threads_; ++i) {
    if (threads_[i].state == state) return &threads_[i];
  }
  return nullptr;
}

// Nobody can run and not everybody has exited: says who waits, and for whom in vain.
void BlockRunner::fail_in_deadlock() {
  const Thread* waiting = first_in(State::kAtBarrier);
  const Thread* elsewhere = nullptr;
  if (waiting) {
    for (int i = 0; i < num_threads_ && !elsewhere; ++i) {
      if (threads_[i].state != State::kAtBarrier) elsewhere = &threads_[i];
    }
  } else if ((waiting = first_in(State::kAtCollective)) != nullptr) {
    const int first = int(waiting->rank) / kWarpSize * kWarpSize;
    for (int i = first; i < first + kWarpSize && !elsewhere; ++i) {
      const bool named = waiting->mask >> (i - first) & 1;
      if (named &&
          (threads_[i].state != State::kAtCollective || threads_[i].mask != waiting->mask)) {
        elsewhere = &threads_[i];
      }
    }
  } else {
    fail_at_named_barrier(*first_in(State::kAtNamedBarrier));
  }
  current_thread = waiting;
  const Text where = text_of(waiting->site);
  const char* what = waiting->state == State::kAtBarrier ? "__syncthreads" : waiting->collective;
  if (elsewhere->state == State::kExited) {
    fail("%s at %s waits for thread %s, which has exited", what, where.chars,
         text_of(elsewhere->index).chars);
  }
  fail("%s at %s waits for thread %s, which waits at %s", what, where.chars,
       text_of(elsewhere->index).chars, text_of(elsewhere->site).chars);
}

// ---- what kernels call ----

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  current_runner->fail_in_current_thread(text);
}

BarrierResult block_barrier(bool predicate, Site site) {
  return current_runner->barrier(predicate, site);
}

void named_barrier(int id, int num_threads, bool waits, Site site) {
  current_runner->named_barrier(id, num_threads, waits, site);
}

void begin_copy(const AsyncCopy& copy) { current_runner->begin_copy(copy); }
void end_copy_group() { current_runner->end_copy_group(); }
bool take_due_copy(int num_pending, AsyncCopy* copy) {
  return current_runner->take_due_copy(num_pending, copy);
}

void warp_collective(const char* name, unsigned mask, void* record, Combine combine, Site site) {
  current_runner->collective(name, mask, record, combine, site);
}

}  // namespace fused::emulator
