// 16-byte loads and stores of any element type.
#pragma once

#include "common/dtype.h"
#include "common/simt.h"

namespace fused {

// As many elements as one 16-byte access moves.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// Whether rows that start at `data` and lie `row_stride` elements apart can be accessed in packs.
template <typename T>
__device__ __forceinline__ bool is_pack_aligned(const T* data, int64_t row_stride) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row_stride * sizeof(T))) %
             sizeof(Pack<T>) ==
         0;
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* data) {
  return *reinterpret_cast<const Pack<T>*>(data);
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
