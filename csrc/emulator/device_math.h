// Atomics, loads with a cache hint and intrinsics of the CUDA language.
//
// The fast intrinsics (__expf, ...) are computed exactly rounded or nearly so: on a GPU they are
// off by a few units in the last place more.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/runtime.h"

namespace fused::emulator {

template <class T>
using Same = std::enable_if_t<true, T>;  // keeps an argument out of template deduction

// Blocks run on several OS threads, so that an atomic has to be one here too.
template <class T, class F>
T atomic_update(T* address, F&& update) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  auto* word = reinterpret_cast<Word*>(address);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    T old;
    std::memcpy(&old, &before, sizeof old);
    const T value = update(old);
    Word after;
    std::memcpy(&after, &value, sizeof after);
    if (__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

}  // namespace fused::emulator

template <class T>
T atomicAdd(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T old) { return T(old + value); });
}
template <class T>
T atomicSub(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T old) { return T(old - value); });
}
template <class T>
T atomicMax(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, fused::emulator::Same<T> expected, fused::emulator::Same<T> value) {
  static_assert(std::is_integral_v<T>);
  return fused::emulator::atomic_update(address,
                                        [=](T old) { return old == expected ? value : old; });
}
template <class T>
T atomicOr(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T old) { return T(old | value); });
}
template <class T>
T atomicAnd(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T old) { return T(old & value); });
}
template <class T>
T atomicXor(T* address, fused::emulator::Same<T> value) {
  return fused::emulator::atomic_update(address, [=](T old) { return T(old ^ value); });
}
inline unsigned atomicDec(unsigned* address, unsigned limit) {
  return fused::emulator::atomic_update(
      address, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return fused::emulator::atomic_update(address,
                                        [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, fused::emulator::Same<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, fused::emulator::Same<T> value) {
  *address = value;
}

// glibc declares some of these names for itself and defines none of them: hence macros.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanhf(x) tanhf(x)

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
  return result;
}

namespace fused::emulator {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace fused::emulator

inline int __float_as_int(float x) { return fused::emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return fused::emulator::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return fused::emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return fused::emulator::bits_as<float>(x); }

// CUDA puts these in the global namespace for every arithmetic pair, mixed ones included. A NaN
// loses against a number, as in fminf and fmaxf.
template <class A, class B, class C = std::common_type_t<A, B>>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, C> min(A a, B b) {
  return C(a) < C(b) || C(b) != C(b) ? C(a) : C(b);
}
template <class A, class B, class C = std::common_type_t<A, B>>
constexpr std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, C> max(A a, B b) {
  return C(a) > C(b) || C(b) != C(b) ? C(a) : C(b);
}
