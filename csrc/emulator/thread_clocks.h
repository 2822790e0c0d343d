// For every thread of a block, how far it is ordered after each other one since the block's last
// __syncthreads: vector clocks. Until a named barrier comes, only lanes of one warp can be ordered
// by less than __syncthreads, and rows are as wide as a warp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "emulator/runtime.h"

namespace fused::emulator {

class ThreadClocks {
 public:
  using Clock = uint16_t;
  using Row = std::vector<Clock>;  // of every thread in the block

  void reset() {
    width_ = kWarpSize;
    clocks_.assign(size_t(kMaxThreads) * kWarpSize, 0);
    for (int thread = 0; thread < kMaxThreads; ++thread) ++at(thread, thread);
  }

  Clock own(int thread) const { return seen(thread, thread); }

  // The clock of `other` up to which `thread` is ordered after it.
  Clock seen(int thread, int other) const {
    if (width_ == kWarpSize && thread / kWarpSize != other / kWarpSize) return 0;
    return clocks_[size_t(thread) * width_ + other % width_];
  }

  // The lanes of a mask have waited for each other.
  void meet(int warp, unsigned mask) {
    Row latest(width_);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (mask >> lane & 1) raise(latest.data(), row(warp * kWarpSize + lane));
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(mask >> lane & 1)) continue;
      std::copy(latest.begin(), latest.end(), row(warp * kWarpSize + lane));
      ++at(warp * kWarpSize + lane, warp * kWarpSize + lane);
    }
  }

  // What the thread did so far is part of `sum` from now on; what it does next is not.
  void arrive(int thread, Row& sum) {
    widen();
    sum.resize(kMaxThreads);
    raise(sum.data(), row(thread));
    ++at(thread, thread);
  }

  // The thread goes on after all that is part of `sum`.
  void leave(int thread, const Row& sum) { raise(row(thread), sum.data()); }

 private:
  Clock* row(int thread) { return &clocks_[size_t(thread) * width_]; }
  Clock& at(int thread, int other) { return row(thread)[other % width_]; }

  void raise(Clock* to, const Clock* from) const {
    for (int i = 0; i < width_; ++i) to[i] = std::max(to[i], from[i]);
  }

  void widen() {
    if (width_ == kMaxThreads) return;
    std::vector<Clock> wide(size_t(kMaxThreads) * kMaxThreads);
    for (int thread = 0; thread < kMaxThreads; ++thread) {
      const size_t first = size_t(thread) / kWarpSize * kWarpSize;
      std::copy_n(row(thread), kWarpSize, &wide[size_t(thread) * kMaxThreads + first]);
    }
    clocks_ = std::move(wide);
    width_ = kMaxThreads;
  }

  int width_ = kWarpSize;
  std::vector<Clock> clocks_;
};

}  // namespace fused::emulator
