// Barriers 1 to 15 of a block, between as many threads as the kernel says (PTX: bar.sync and
// bar.arrive). Barrier 0 is __syncthreads, in block.cpp.
#include "emulator/block.h"
#include "emulator/races.h"
#include "emulator/text.h"

namespace fused::emulator {

void BlockRunner::named_barrier(int id, int num_threads, bool waits, Site site) {
  Thread& self = current();
  const char* name = waits ? "bar.sync" : "bar.arrive";
  if (id < 1 || id >= kNamedBarriers) {
    fail("%s at %s: the barrier must be 1 to 15 (0 is __syncthreads), got %d", name,
         text_of(site).chars, id);
  }
  if (num_threads < kWarpSize || num_threads > num_threads_ || num_threads % kWarpSize != 0) {
    fail("%s %d at %s: the count must be a multiple of 32, at most the block's %d threads, got %d",
         name, id, text_of(site).chars, num_threads_, num_threads);
  }
  NamedBarrier& barrier = named_barriers_[id];
  if (barrier.arrived == 0) barrier.expected = num_threads;
  if (barrier.expected != num_threads) {
    fail("%s %d at %s: for %d threads, while others wait for %d", name, id, text_of(site).chars,
         num_threads, barrier.expected);
  }
  unsigned& lanes = barrier.lanes[self.rank / kWarpSize];
  const unsigned lane = 1u << self.rank % kWarpSize;
  if (lanes & lane) {
    fail("%s %d at %s: comes again before the barrier has let go", name, id, text_of(site).chars);
  }
  lanes |= lane;
  races_arrive_at_named_barrier(id, self.rank);
  self.site = site;
  self.barrier_id = waits ? id : 0;
  if (++barrier.arrived == barrier.expected) {
    complete_named_barrier(id, site);
  } else if (waits) {
    self.state = State::kAtNamedBarrier;
    suspend();
  }
}

void BlockRunner::complete_named_barrier(int id, Site site) {
  Thread& self = current();
  for (int warp = 0; warp * kWarpSize < num_threads_; ++warp) {
    const unsigned lanes = named_barriers_[id].lanes[warp];
    if (lanes != 0 && lanes != ~0u) {
      fail("barrier %d at %s: of warp %d came lanes %08x alone", id, text_of(site).chars, warp,
           lanes);
    }
  }
  named_barriers_[id] = {};
  for (int i = 0; i < num_threads_; ++i) {
    Thread& other = threads_[i];
    const bool waits = other.state == State::kAtNamedBarrier && other.barrier_id == id;
    if (waits) {
      other.state = State::kReady;
      ready_.insert(i);
    }
    if (waits || (&other == &self && self.barrier_id == id)) races_leave_named_barrier(id, i);
  }
  races_reset_named_barrier(id);
}

void BlockRunner::fail_at_named_barrier(const Thread& waiting) {
  current_thread = &waiting;
  const NamedBarrier& barrier = named_barriers_[waiting.barrier_id];
  fail("bar.sync %d at %s waits for %d threads, of which %d have come", waiting.barrier_id,
       text_of(waiting.site).chars, barrier.expected, barrier.arrived);
}

// A barrier that threads arrived at and nobody waited for is left half full on a GPU.
void BlockRunner::check_named_barriers() {
  for (int id = 1; id < kNamedBarriers; ++id) {
    const NamedBarrier& barrier = named_barriers_[id];
    if (barrier.arrived == 0) continue;
    error_ = ": ends with " + std::to_string(barrier.arrived) + " of " +
             std::to_string(barrier.expected) + " threads at barrier " + std::to_string(id);
    return;
  }
}

}  // namespace fused::emulator
