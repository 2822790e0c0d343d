// The functions that g++ calls at every access of code compiled with -fsanitize=thread (GCC,
// gcc/sanitizer.def; compiler-rt, lib/tsan/rtl/tsan_interface.h), answered by races.cpp.
#ifdef FUSED_EMULATOR_RACES

#include <cstddef>
#include <cstdint>

namespace fused::emulator {

void race_read(const void* address, size_t size, bool is_atomic, const void* where);
void race_write(const void* address, size_t size, bool is_atomic, const void* where);

}  // namespace fused::emulator

using fused::emulator::race_read;
using fused::emulator::race_write;

// The hook's caller is the access. A macro, for it must be the hook itself that asks.
#define FUSED_CALLER __builtin_return_address(0)

#define FUSED_ACCESS_HOOKS(kind, size)                                                 \
  void __tsan_##kind##read##size(void* p) { race_read(p, size, false, FUSED_CALLER); } \
  void __tsan_##kind##write##size(void* p) { race_write(p, size, false, FUSED_CALLER); }

#define FUSED_ATOMIC_HOOKS(bits, Word)                                                            \
  Word __tsan_atomic##bits##_load(const volatile Word* p, int order) {                            \
    race_read(const_cast<const Word*>(p), sizeof(Word), true, FUSED_CALLER);                      \
    return __atomic_load_n(p, order);                                                             \
  }                                                                                               \
  void __tsan_atomic##bits##_store(volatile Word* p, Word value, int order) {                     \
    race_write(const_cast<const Word*>(p), sizeof(Word), true, FUSED_CALLER);                     \
    __atomic_store_n(p, value, order);                                                            \
  }                                                                                               \
  Word __tsan_atomic##bits##_fetch_add(volatile Word* p, Word value, int order) {                 \
    race_write(const_cast<const Word*>(p), sizeof(Word), true, FUSED_CALLER);                     \
    return __atomic_fetch_add(p, value, order);                                                   \
  }                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile Word* p, Word* expected, Word value, \
                                                    int success, int failure) {                   \
    race_write(const_cast<const Word*>(p), sizeof(Word), true, FUSED_CALLER);                     \
    return __atomic_compare_exchange_n(p, expected, value, false, success, failure);              \
  }

#pragma GCC visibility push(hidden)
extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}

void __tsan_read_range(void* p, size_t size) { race_read(p, size, false, FUSED_CALLER); }
void __tsan_write_range(void* p, size_t size) { race_write(p, size, false, FUSED_CALLER); }

FUSED_ACCESS_HOOKS(, 1)
FUSED_ACCESS_HOOKS(, 2)
FUSED_ACCESS_HOOKS(, 4)
FUSED_ACCESS_HOOKS(, 8)
FUSED_ACCESS_HOOKS(, 16)
FUSED_ACCESS_HOOKS(unaligned_, 2)
FUSED_ACCESS_HOOKS(unaligned_, 4)
FUSED_ACCESS_HOOKS(unaligned_, 8)
FUSED_ACCESS_HOOKS(unaligned_, 16)
FUSED_ACCESS_HOOKS(volatile_, 1)
FUSED_ACCESS_HOOKS(volatile_, 2)
FUSED_ACCESS_HOOKS(volatile_, 4)
FUSED_ACCESS_HOOKS(volatile_, 8)
FUSED_ACCESS_HOOKS(volatile_, 16)

FUSED_ATOMIC_HOOKS(32, uint32_t)
FUSED_ATOMIC_HOOKS(64, uint64_t)

// Guards of function-local statics.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int order) {
  return __atomic_load_n(p, order);
}

}  // extern "C"
#pragma GCC visibility pop

#endif  // FUSED_EMULATOR_RACES
