// What the tensor-core kernels of convolution are made of. Both factors of a step's products are
// tiles of rows of kMmaDepth neighbours in depth, swizzled (common/mma_element.cuh), in whatever
// order the tensors lie: what does not lie so is gathered, 16 bytes of depth by a thread.
#pragma once

#include "common/launch.h"
#include "common/mma_tile.cuh"
#include "conv/conv_gather.cuh"

namespace fused {

constexpr int kConvWarps = kConvThreads / kWarpSize;

template <typename T>
constexpr int kDepthChunks = kMmaDepth / kChunk<T>;  // of 16 bytes in a row of a tile

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// sums[m][n] += columns own_column + 16m .. times columns other_column + 8n .., over kMmaDepth rows
// of kOwn and of kOther elements. Of 16 bits each, for ldmatrix turns no others.
template <int kOwn, int kOther, int kM, int kN, typename T>
__device__ __forceinline__ void add_column_products(const T* own, int own_column, const T* other,
                                                    int other_column, float (&sums)[kM][kN][4]) {
  static_assert(sizeof(T) == 2);
  constexpr int kDepth = MmaElement<T>::kDepth;
  const int lane = threadIdx.x % kWarpSize;
  add_products<T, kMmaDepth / kDepth>(
      [&](int k, int m, uint32_t (&a)[4]) {
        const int row = k * kDepth + lane / 16 * 8 + lane % 8;
        const int chunk = own_column / 8 + 2 * m + lane / 8 % 2;
        ptx::ldmatrix<true>(a, own + chunk_offset<T, kOwn>(row, chunk));
      },
      [&](int k, int n, uint32_t (&b)[4]) {
        const int row = k * kDepth + lane % 16;
        const int chunk = other_column / 8 + n + lane / 16;
        ptx::ldmatrix<true>(b, other + chunk_offset<T, kOther>(row, chunk));
      },
      sums);
}

// Calls visit(i) for a thread's share of kCount indices. Unsigned, and as many times for all
// threads as the compiler can see: divisions are then shifts, and loops are none.
template <int kCount, typename Visit>
__device__ __forceinline__ void for_each_share(const Visit& visit) {
#pragma unroll
  for (unsigned j = 0; j * kConvThreads < kCount; ++j) {
    const unsigned i = threadIdx.x + j * kConvThreads;
    if (kCount % kConvThreads == 0 || i < kCount) visit(i);
  }
}

// The chunks of a tile of kRows rows that a thread carries from global to shared memory. Its lanes
// run along rows, or along depth if that is what lies side by side in global memory. Depth has no
// order of its own, as long as both factors have the same: where lanes run along it, those with the
// chunks of a row read neighbours, and the elements of a chunk lie as far apart as there are
// chunks.
template <typename T, int kRows, bool kAlongRows>
struct ChunkCarrier {
  static constexpr int kCount = kRows * kDepthChunks<T> / kConvThreads;
  static_assert(kCount * kConvThreads == kRows * kDepthChunks<T>, "every thread as many");
  Pack<T> chunks[kCount];

  static __device__ __forceinline__ int row(int i) {
    const unsigned index = threadIdx.x + i * kConvThreads;
    return static_cast<int>(kAlongRows ? index % kRows : index / kDepthChunks<T>);
  }
  static __device__ __forceinline__ int chunk(int i) {
    const unsigned index = threadIdx.x + i * kConvThreads;
    return static_cast<int>(kAlongRows ? index / kRows : index % kDepthChunks<T>);
  }

  // fill(row, chunk, elements) gives the elements of a chunk.
  template <typename Fill>
  __device__ __forceinline__ void fetch_chunks(const Fill& fill) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) fill(row(i), chunk(i), chunks[i].element);
  }

  // element(row, depth) is an element of the tile.
  template <typename Element>
  __device__ __forceinline__ void fetch(const Element& element) {
    fetch_chunks([&](int row, int chunk, T(&elements)[kChunk<T>]) {
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        elements[j] =
            element(row, kAlongRows ? chunk * kChunk<T> + j : j * kDepthChunks<T> + chunk);
      }
    });
  }

  __device__ __forceinline__ void put(T* tile) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      store_pack(tile + chunk_offset<T, kMmaDepth>(row(i), chunk(i)), chunks[i]);
    }
  }
};

}  // namespace fused
