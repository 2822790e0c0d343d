// Which thread of a block runs next.
#pragma once

#include <array>
#include <cstdint>

#include "emulator/control.h"

namespace fused::emulator {

// The next of at most 1024 threads to run, in the chosen order.
class ReadySet {
 public:
  void reset(Order order, uint64_t seed, uint64_t block_rank, int num_threads);
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

}  // namespace fused::emulator
