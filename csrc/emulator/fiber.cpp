#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fused::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
// Where stacks begin is staggered within a page: with every top at the same offset, the hot frames
// of a warp would compete for one set of the first-level cache.
constexpr size_t kStagger = 192, kPlaces = 21;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

size_t slot_bytes() { return kStackBytes + 2 * page_bytes(); }  // guard, stack, staggered part

}  // namespace

// Saves the callee-saved registers on the running stack, the stack pointer in *save, and goes on
// where load was saved.
//
// Written out for the two processors that the package runs on, rather than taken from Boost: a user
// who runs the tests has a compiler and Python. swapcontext would be portable, and makes two system
// calls at every switch.
extern "C" void fused_emulator_switch_stack(void** save, void* load)
    __attribute__((visibility("hidden")));

#if defined(__x86_64__)
constexpr size_t kSavedWords = 6;
asm(R"(
  .text
  .hidden fused_emulator_switch_stack
  .globl fused_emulator_switch_stack
  .type fused_emulator_switch_stack, @function
fused_emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fused_emulator_switch_stack, . - fused_emulator_switch_stack
)");
#elif defined(__aarch64__)
constexpr size_t kSavedWords = 20, kLinkRegister = 11;
asm(R"(
  .text
  .hidden fused_emulator_switch_stack
  .globl fused_emulator_switch_stack
  .type fused_emulator_switch_stack, %function
fused_emulator_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size fused_emulator_switch_stack, . - fused_emulator_switch_stack
)");
#else
#error "the emulator switches stacks on x86-64 and aarch64 only"
#endif

// ---- Stacks ----

Stacks::Stacks(int capacity) : capacity_(capacity) {
  size_ = static_cast<size_t>(capacity) * slot_bytes();
  void* mapping =
      mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  begin_ = reinterpret_cast<uintptr_t>(mapping);
}

Stacks::~Stacks() { munmap(reinterpret_cast<void*>(begin_), size_); }

int Stacks::take() {
  if (!free_.empty()) {
    const int stack = free_.back();
    free_.pop_back();
    return stack;
  }
  if (num_opened_ == capacity_ ||
      mprotect(bottom(num_opened_), kStackBytes + page_bytes(), PROT_READ | PROT_WRITE) != 0) {
    throw std::bad_alloc();
  }
  return num_opened_++;
}

void Stacks::take_back_all() {
  free_.clear();
  for (int stack = num_opened_ - 1; stack >= 0; --stack) free_.push_back(stack);
}

unsigned char* Stacks::bottom(int stack) const {
  return reinterpret_cast<unsigned char*>(begin_ + static_cast<size_t>(stack) * slot_bytes() +
                                          page_bytes());
}

unsigned char* Stacks::top(int stack) const {
  return bottom(stack) + kStackBytes + page_bytes() -
         static_cast<size_t>(stack) % kPlaces * kStagger;
}

// ---- Context ----

void Context::prepare(const Stacks& stacks, int stack, void (*entry)()) {
  bottom_ = stacks.bottom(stack);
  size_ = static_cast<size_t>(stacks.top(stack) - stacks.bottom(stack));
  auto* words = reinterpret_cast<uintptr_t*>(stacks.top(stack));
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(bottom_, size_);  // of what an abandoned launch left there
  fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  // As if entry had been called: a return address of zero, where a debugger's backtrace ends, and a
  // stack pointer eight bytes off a multiple of sixteen.
  words -= kSavedWords + 2;
  std::memset(words, 0, (kSavedWords + 2) * sizeof *words);
  words[kSavedWords] = reinterpret_cast<uintptr_t>(entry);
#else
  words -= kSavedWords;
  std::memset(words, 0, kSavedWords * sizeof *words);
  words[kLinkRegister] = reinterpret_cast<uintptr_t>(entry);
#endif
  stack_pointer_ = words;
}

#ifndef __SANITIZE_ADDRESS__

void Context::switch_to(Context& next, bool) {
  fused_emulator_switch_stack(&stack_pointer_, next.stack_pointer_);
}

void Context::arrive() {}

#else

namespace {
thread_local Context* left = nullptr;  // the context that the last switch came from
thread_local Context* reached = nullptr;
}  // namespace

void Context::switch_to(Context& next, bool has_ended) {
  left = this;
  reached = &next;
  __sanitizer_start_switch_fiber(has_ended ? nullptr : &fake_stack_, next.bottom_, next.size_);
  fused_emulator_switch_stack(&stack_pointer_, next.stack_pointer_);
  arrive();
}

void Context::arrive() {
  // Tells where the stack is that we left, which nobody knows of the scheduler's.
  __sanitizer_finish_switch_fiber(reached->fake_stack_, &left->bottom_, &left->size_);
}

#endif

}  // namespace fused::emulator
