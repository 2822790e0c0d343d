// What the two LSTM cell kernels share: the split of the work, vector access, activations.
#pragma once

#include "common/launch.h"
#include "common/vector_load.cuh"
#include "lstm/lstm.h"

namespace fused {

template <typename T, int N>
__device__ __forceinline__ void load_hidden(const void* base, int64_t index, Accumulator<T>* out) {
  load_widened<T, N>(static_cast<const T*>(base) + index, out);
}

// A null base reads zeros.
template <typename T, int N>
__device__ __forceinline__ void load_hidden_or_zero(const void* maybe_base, int64_t index,
                                                    Accumulator<T>* out) {
  if (maybe_base != nullptr) {
    load_hidden<T, N>(maybe_base, index, out);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) out[n] = 0;
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_hidden(void* base, int64_t index, const Accumulator<T>* in) {
  store_narrowed<T, N>(static_cast<T*>(base) + index, in);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

constexpr int kLstmThreads = 128;

// Hidden elements per thread: 16 bytes, but at most 4, or a small batch would leave a GPU idle.
template <typename T>
constexpr int kLstmPack = sizeof(T) >= 4 ? 16 / sizeof(T) : 4;

inline unsigned lstm_blocks(int32_t batch, int32_t hidden_size, int pack) {
  const int64_t threads = static_cast<int64_t>(batch) * (hidden_size / pack);
  return static_cast<unsigned>((threads + kLstmThreads - 1) / kLstmThreads);
}

// Packs need a hidden size that they divide and bases on their boundary: rows then start on one.
inline bool on_boundary(int64_t bytes, std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) return false;
  }
  return true;
}

}  // namespace fused
