// Loads and stores of several elements at a time, of any type.
#pragma once

#include "common/dtype.h"
#include "common/simt.h"

namespace fused {

// N neighbours in memory, by default as many as one 16-byte access moves; more take several.
template <typename T, int N = 16 / sizeof(T)>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  static constexpr int kSize = N;
  T element[N];
};

// Whether rows that start at `data` and lie `row_stride` elements apart can be accessed in packs.
template <typename T>
__device__ __forceinline__ bool is_pack_aligned(const T* data, int64_t row_stride) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row_stride * sizeof(T))) %
             sizeof(Pack<T>) ==
         0;
}

template <typename T, int N = Pack<T>::kSize>
__device__ __forceinline__ Pack<T, N> load_pack(const T* data) {
  return *reinterpret_cast<const Pack<T, N>*>(data);
}

template <typename T, int N>
__device__ __forceinline__ void store_pack(T* data, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(data) = pack;
}

// The same, as the numbers that kernels compute with.
template <typename T, int N>
__device__ __forceinline__ void load_widened(const T* data, Accumulator<T>* out) {
  const Pack<T, N> pack = load_pack<T, N>(data);
#pragma unroll
  for (int n = 0; n < N; ++n) out[n] = load(pack.element[n]);
}

template <typename T, int N>
__device__ __forceinline__ void store_narrowed(T* data, const Accumulator<T>* in) {
  Pack<T, N> pack;
#pragma unroll
  for (int n = 0; n < N; ++n) pack.element[n] = store<T>(in[n]);
  store_pack(data, pack);
}

// A pack, or zeros. As words: of 16-bit elements the compiler would put each beside its zero.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack_if(bool exists, const T* data) {
  Pack<uint32_t> words{};
  static_assert(sizeof(words) == sizeof(Pack<T>));
  if (exists) words = *reinterpret_cast<const Pack<uint32_t>*>(data);
  Pack<T> pack;
  __builtin_memcpy(&pack, &words, sizeof pack);
  return pack;
}

// The elements that lie inside, zeros behind them.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack_partly(const T* data, int count) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) pack.element[i] = i < count ? data[i] : T{};
  return pack;
}

}  // namespace fused
