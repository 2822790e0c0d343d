// Fetching ahead by hand, for passes over memory that would wait for it: the hardware's prefetchers
// end with a page, and follow a single stream less far than memory is away.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused {

constexpr size_t kCacheLine = 64;

// Asks for what lies from `data` on. It need not exist: a prefetch cannot fail.
inline void prefetch(const void* data, size_t bytes = kCacheLine) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  for (size_t at = 0; at < bytes; at += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + at));
  }
  // g++ takes a function that only prefetches for one without effect, and drops its calls. This is
  // an effect, of no instruction.
  asm volatile("");
}

}  // namespace fused
