// Products of swizzled tiles in shared memory (common/mma_element.cuh) by one warp, and where its
// lanes have the sums: lane l holds of each 16 by 8 tile, with g = l / 4 and t = l % 4, the
// elements (g, 2t), (g, 2t + 1), (g + 8, 2t) and (g + 8, 2t + 1).
#pragma once

#include "common/mma_element.cuh"

namespace fused {

// Where a lane's element [m][n][i] of a warp's kM by kN tiles of sums lies.
__device__ __forceinline__ int row_of_element(int m, int i) {
  return 16 * m + static_cast<int>(threadIdx.x) % kWarpSize / 4 + i / 2 * 8;
}
__device__ __forceinline__ int column_of_element(int n, int i) {
  return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

// Calls visit(m, n, i) for each element that a lane holds; all indices are constants to the
// compiler.
template <int kM, int kN, typename Visit>
__device__ __forceinline__ void for_each_element(const Visit& visit) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(m, n, i);
    }
  }
}

// sums[m][n] += tile m of the left factors times tile n of the right ones, for kProducts steps of
// depth. left(k, m, a) and right(k, n, b) read them, the right ones of tiles n and n + 1 together.
template <typename T, int kProducts, int kM, int kN, typename Left, typename Right>
__device__ __forceinline__ void add_products(const Left& left, const Right& right,
                                             float (&sums)[kM][kN][4]) {
  using Element = MmaElement<T>;
#pragma unroll
  for (int k = 0; k < kProducts; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      left(k, m, a[m]);
      Element::to_factor(a[m]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      right(k, n, b);
      Element::to_factor(b);
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Element::mma(sums[m][n], a[m], first);
        Element::mma(sums[m][n + 1], a[m], second);
      }
    }
  }
}

// sums[m][n] += rows own_row + 16m .. times other rows 8n .. .
template <int kDim, int kM, int kN, typename T>
__device__ __forceinline__ void add_row_products(const T* own, int own_row, const T* other,
                                                 float (&sums)[kM][kN][4]) {
  const int lane = threadIdx.x % kWarpSize;
  const int own_offset = chunk_offset<T, kDim>(own_row + lane % 16, lane / 16);
  const int other_offset = chunk_offset<T, kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  add_products<T, kDim / MmaElement<T>::kDepth>(
      [&](int k, int m, uint32_t (&a)[4]) {
        ptx::ldmatrix<false>(a, own + 16 * m * kDim + stepped<T, kDim>(own_offset, 2 * k));
      },
      [&](int k, int n, uint32_t (&b)[4]) {
        ptx::ldmatrix<false>(b, other + 8 * n * kDim + stepped<T, kDim>(other_offset, 2 * k));
      },
      sums);
}

template <int kDim, int kM, int kN, typename T>
__device__ __forceinline__ void row_products(const T* own, int own_row, const T* other,
                                             float (&sums)[kM][kN][4]) {
  for_each_element<kM, kN>([&](int m, int n, int i) { sums[m][n][i] = 0; });
  add_row_products<kDim>(own, own_row, other, sums);
}

}  // namespace fused
