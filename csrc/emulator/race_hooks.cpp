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

void __tsan_read1(void* p) { race_read(p, 1, false, FUSED_CALLER); }
void __tsan_write1(void* p) { race_write(p, 1, false, FUSED_CALLER); }
void __tsan_read2(void* p) { race_read(p, 2, false, FUSED_CALLER); }
void __tsan_write2(void* p) { race_write(p, 2, false, FUSED_CALLER); }
void __tsan_read4(void* p) { race_read(p, 4, false, FUSED_CALLER); }
void __tsan_write4(void* p) { race_write(p, 4, false, FUSED_CALLER); }
void __tsan_read8(void* p) { race_read(p, 8, false, FUSED_CALLER); }
void __tsan_write8(void* p) { race_write(p, 8, false, FUSED_CALLER); }
void __tsan_read16(void* p) { race_read(p, 16, false, FUSED_CALLER); }
void __tsan_write16(void* p) { race_write(p, 16, false, FUSED_CALLER); }

void __tsan_unaligned_read2(void* p) { race_read(p, 2, false, FUSED_CALLER); }
void __tsan_unaligned_write2(void* p) { race_write(p, 2, false, FUSED_CALLER); }
void __tsan_unaligned_read4(void* p) { race_read(p, 4, false, FUSED_CALLER); }
void __tsan_unaligned_write4(void* p) { race_write(p, 4, false, FUSED_CALLER); }
void __tsan_unaligned_read8(void* p) { race_read(p, 8, false, FUSED_CALLER); }
void __tsan_unaligned_write8(void* p) { race_write(p, 8, false, FUSED_CALLER); }
void __tsan_unaligned_read16(void* p) { race_read(p, 16, false, FUSED_CALLER); }
void __tsan_unaligned_write16(void* p) { race_write(p, 16, false, FUSED_CALLER); }

void __tsan_volatile_read1(void* p) { race_read(p, 1, false, FUSED_CALLER); }
void __tsan_volatile_write1(void* p) { race_write(p, 1, false, FUSED_CALLER); }
void __tsan_volatile_read2(void* p) { race_read(p, 2, false, FUSED_CALLER); }
void __tsan_volatile_write2(void* p) { race_write(p, 2, false, FUSED_CALLER); }
void __tsan_volatile_read4(void* p) { race_read(p, 4, false, FUSED_CALLER); }
void __tsan_volatile_write4(void* p) { race_write(p, 4, false, FUSED_CALLER); }
void __tsan_volatile_read8(void* p) { race_read(p, 8, false, FUSED_CALLER); }
void __tsan_volatile_write8(void* p) { race_write(p, 8, false, FUSED_CALLER); }
void __tsan_volatile_read16(void* p) { race_read(p, 16, false, FUSED_CALLER); }
void __tsan_volatile_write16(void* p) { race_write(p, 16, false, FUSED_CALLER); }

// Guards of function-local statics.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int order) {
  return __atomic_load_n(p, order);
}

uint32_t __tsan_atomic32_load(const volatile uint32_t* p, int order) {
  race_read(const_cast<const uint32_t*>(p), 4, true, FUSED_CALLER);
  return __atomic_load_n(p, order);
}
void __tsan_atomic32_store(volatile uint32_t* p, uint32_t value, int order) {
  race_write(const_cast<const uint32_t*>(p), 4, true, FUSED_CALLER);
  __atomic_store_n(p, value, order);
}
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t value, int order) {
  race_write(const_cast<const uint32_t*>(p), 4, true, FUSED_CALLER);
  return __atomic_fetch_add(p, value, order);
}
int __tsan_atomic32_compare_exchange_strong(volatile uint32_t* p, uint32_t* expected,
                                            uint32_t value, int success, int failure) {
  race_write(const_cast<const uint32_t*>(p), 4, true, FUSED_CALLER);
  return __atomic_compare_exchange_n(p, expected, value, false, success, failure);
}

uint64_t __tsan_atomic64_load(const volatile uint64_t* p, int order) {
  race_read(const_cast<const uint64_t*>(p), 8, true, FUSED_CALLER);
  return __atomic_load_n(p, order);
}
void __tsan_atomic64_store(volatile uint64_t* p, uint64_t value, int order) {
  race_write(const_cast<const uint64_t*>(p), 8, true, FUSED_CALLER);
  __atomic_store_n(p, value, order);
}
uint64_t __tsan_atomic64_fetch_add(volatile uint64_t* p, uint64_t value, int order) {
  race_write(const_cast<const uint64_t*>(p), 8, true, FUSED_CALLER);
  return __atomic_fetch_add(p, value, order);
}
int __tsan_atomic64_compare_exchange_strong(volatile uint64_t* p, uint64_t* expected,
                                            uint64_t value, int success, int failure) {
  race_write(const_cast<const uint64_t*>(p), 8, true, FUSED_CALLER);
  return __atomic_compare_exchange_n(p, expected, value, false, success, failure);
}

}  // extern "C"
#pragma GCC visibility pop

#endif  // FUSED_EMULATOR_RACES
