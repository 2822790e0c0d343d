// Stacks and the switch between them: all that a CUDA thread is here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fused::emulator {

// The stacks of the threads of one block, in one reservation, each with a guard page below it.
// Pages are touched, and paid for, only as deep as a kernel goes; room is ample because sanitizers
// and -O0 make frames many times larger.
class Stacks {
 public:
  explicit Stacks(int capacity);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  int take();
  void give_back(int stack) { free_.push_back(stack); }
  void take_back_all();
  bool contains(uintptr_t address) const { return address - begin_ < size_; }

  unsigned char* bottom(int stack) const;
  unsigned char* top(int stack) const;

 private:
  const int capacity_;
  uintptr_t begin_ = 0, size_ = 0;
  int num_opened_ = 0;
  std::vector<int> free_;
};

// A place where execution can go on: the scheduler's, or a fiber's.
class Context {
 public:
  // Starts anew: the next switch to it calls entry, which must not return, on this stack.
  void prepare(const Stacks& stacks, int stack, void (*entry)());

  // What runs now is saved in this and goes on when somebody switches back; or, when it has ended,
  // never. (Rounding mode and x87 state are shared by all contexts.)
  void switch_to(Context& next, bool has_ended = false);

  // The first thing that entry calls.
  static void arrive();

 private:
  void* stack_pointer_ = nullptr;
  // For AddressSanitizer alone, which must be told where the stack is.
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fused::emulator
