// Stacks and the switch between them: all that a CUDA thread is here.
#pragma once

#include <cstddef>

namespace fused::emulator {

// A stack with a guard page below it. Pages are touched, and paid for, only as deep as a kernel
// goes; room is ample because sanitizers and -O0 make frames many times larger.
class Stack {
 public:
  // slot staggers where stacks begin: with every top at the same offset in its page, the hot frames
  // of a warp would compete for one set of the first-level cache.
  explicit Stack(int slot);
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  // A stack pointer to hand to switch_stack, which then calls entry. entry must not return.
  void* prepare(void (*entry)()) const;

  unsigned char* base() const;  // lowest usable byte
  size_t size() const;          // usable bytes from there

 private:
  unsigned char* mapping_;
  unsigned char* top_;
};

// Saves the running context's callee-saved registers on its stack, its stack pointer in *save, and
// goes on where load was saved. (Rounding mode and x87 state are shared by all.)
extern "C" void fused_emulator_switch_stack(void** save, void* load)
    __attribute__((visibility("hidden")));

}  // namespace fused::emulator
