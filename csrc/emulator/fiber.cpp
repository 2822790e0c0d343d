#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace fused::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kStagger = 192;  // three cache lines: 21 places within a page
constexpr size_t kPlaces = 21;

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

// Written out for the two processors that the package runs on, rather than taken from Boost: a user
// who runs the tests has a compiler and Python. swapcontext would be portable, and makes two system
// calls at every switch.
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

Stack::Stack(int slot) {
  const size_t bytes = kStackBytes + 2 * page_bytes();  // the guard, and the staggered part
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED || mprotect(mapping, page_bytes(), PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  mapping_ = static_cast<unsigned char*>(mapping);
  top_ = mapping_ + bytes - (static_cast<size_t>(slot) % kPlaces) * kStagger;
}

Stack::~Stack() { munmap(mapping_, kStackBytes + 2 * page_bytes()); }

unsigned char* Stack::base() const { return mapping_ + page_bytes(); }
size_t Stack::size() const { return static_cast<size_t>(top_ - base()); }

void* Stack::prepare(void (*entry)()) const {
  auto* words = reinterpret_cast<uintptr_t*>(top_);
#if defined(__x86_64__)
  // As if entry had been called: a return address of zero, where a debugger's backtrace ends, and a
  // stack pointer eight bytes off a multiple of sixteen.
  words -= kSavedWords + 2;
  std::memset(words, 0, (kSavedWords + 2) * sizeof *words);
  words[kSavedWords] = reinterpret_cast<uintptr_t>(entry);
#else
  words -= 20;
  std::memset(words, 0, 20 * sizeof *words);
  words[11] = reinterpret_cast<uintptr_t>(entry);  // x30
#endif
  return words;
}

}  // namespace fused::emulator
