#include "emulator/ready_set.h"

namespace fused::emulator {
namespace {

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace

void ReadySet::reset(Order order, uint64_t seed, uint64_t block_rank, int num_threads) {
  words_.fill(0);
  order_ = order;
  // Each block draws its own order, whatever OS thread it runs on.
  random_state_ = seed + block_rank * 0x9e3779b97f4a7c15;
  random_state_ = next_random(random_state_);
  num_threads_ = num_threads;
  last_taken_ = order == Order::kReverse ? num_threads : -1;
}

int ReadySet::first_from(int thread) const {
  for (int word = thread / 64, bit = thread % 64; word < int(words_.size()); ++word, bit = 0) {
    const uint64_t rest = words_[word] >> bit;
    if (rest) return word * 64 + bit + __builtin_ctzll(rest);
  }
  return -1;
}

int ReadySet::last_to(int thread) const {
  for (int word = thread / 64, bit = thread % 64; word >= 0; --word, bit = 63) {
    const uint64_t rest = words_[word] << (63 - bit);
    if (rest) return word * 64 + bit - __builtin_clzll(rest);
  }
  return -1;
}

int ReadySet::take() {
  int taken = -1;
  if (order_ == Order::kReverse) {
    if (last_taken_ > 0) taken = last_to(last_taken_ - 1);
    if (taken < 0) taken = last_to(kMaxThreads - 1);
  } else {
    const int from = order_ == Order::kForward ? last_taken_ + 1
                                               : int(next_random(random_state_) % num_threads_);
    if (from < kMaxThreads) taken = first_from(from);
    if (taken < 0) taken = first_from(0);
  }
  if (taken < 0) return -1;
  words_[taken / 64] &= ~(uint64_t(1) << taken % 64);
  return last_taken_ = taken;
}

}  // namespace fused::emulator
