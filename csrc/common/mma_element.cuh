// What the tensor cores ask of an element type: how a product takes its factors, and where the
// columns of a result lie. float goes as tf32, in which each factor of a product is rounded to 10
// bits behind the point first.
//
// Layouts are those of common/ptx.h, with g = lane / 4 and t = lane % 4. A row of 16 bytes in
// shared memory holds 8 elements of 16 bits or 4 of 32, and products are two such rows deep, so
// that ldmatrix gives the fragments of rows for both. What differs is the product of weights and
// rows of values, whose right factor needs columns.
#pragma once

#include "common/ptx.h"
#include "common/vector_load.cuh"
#include "common/warp.cuh"

namespace fused {

constexpr int kMmaArchitecture = 80;  // the oldest one that has these products

template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // elements in 16 bytes, the unit of every copy

// Groups of this many chunks have eight, or four, in every order of banks.
template <typename T, int kDim>
constexpr int kTurned = kDim * sizeof(T) % 128 == 0 ? 8 : 4;

// Where chunk `chunk` of row `row` lies in a tile of rows of kDim elements. The chunks of a row are
// exchanged among themselves so that eight rows have the same chunk in eight different groups of
// banks: ldmatrix then reads them at once. Where two rows share 128 bytes (16 bits, kDim 32 or 96),
// each pair has its own order, and the two lie apart already.
template <typename T, int kDim>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(kDim % 32 == 0, "whole groups of four chunks");
  const int turn = kTurned<T, kDim> == 8 ? row % 8 : row / 2 % 4;
  return row * kDim + (chunk ^ turn) * kChunk<T>;
}

// Where chunk `chunk ^ step` of the row lies, given where `chunk`, 0 or 1, does: one register for
// all steps of a product, where each step's own would cost too many.
template <typename T, int kDim>
__device__ __forceinline__ int stepped(int offset, int step) {
  constexpr int kGroup = kTurned<T, kDim>;
  return (offset ^ (step % kGroup * kChunk<T>)) + step / kGroup * kGroup * kChunk<T>;
}

// 16 bits. Tile d of a result has the columns 8d ..
template <typename T>
struct MmaElement {
  static constexpr int kDepth = 16;  // of a product
  static constexpr int kGroup = 2;   // tiles of a result whose values come together

  // Makes what ldmatrix read a factor.
  static __device__ __forceinline__ void to_factor(uint32_t (&)[4]) {}

  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, Half>) {
      ptx::mma_m16n8k16_f16(d, a, b, d);
    } else {
      ptx::mma_m16n8k16_bf16(d, a, b, d);
    }
  }

  // The left factor of depth kDepth that tiles of sums side by side are, from `sums` on: two sums
  // side by side are, rounded, a register of it.
  static __device__ __forceinline__ void to_left(const float (*sums)[4], uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = store_pair<T>(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
    }
  }

  // The right factors that rows of values are: of rows kDepth * k .., for tiles d .. of the result.
  template <int kDim>
  struct Values {
    const T* rows;
    int offset;

    __device__ __forceinline__ explicit Values(const T* values)
        : rows(values),
          offset(chunk_offset<T, kDim>(threadIdx.x % 16, threadIdx.x % kWarpSize / 16)) {}

    __device__ __forceinline__ void load(int k, int d, uint32_t (&b)[kGroup][2]) const {
      uint32_t all[4];
      ptx::ldmatrix<true>(all, rows + kDepth * k * kDim + stepped<T, kDim>(offset, d));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = all[i];
    }
  };

  // Writes one of the lane's rows of a result into a tile of rows.
  template <int kDim>
  static __device__ __forceinline__ void store_row(T* tile, int row, int half, float scale,
                                                   const float (&result)[kDim / 8][4]) {
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      T* to = tile + chunk_offset<T, kDim>(row, d) + threadIdx.x % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) =
          store_pair<T>(result[d][2 * half] * scale, result[d][2 * half + 1] * scale);
    }
  }
};

// tf32. The depth of a product has no order of its own, nor have the columns of a result, and both
// are taken as they suit the lanes. Depth t and t + 4 are columns 2t and 2t + 1 of the sums, which
// lane t of four has; and tile 4e + i of a result has the columns 32e + 4j + i, j = 0 .. 7, so that
// a lane reads four neighbours of a row of values at once, and in the end has eight of a result.
template <>
struct MmaElement<float> {
  static constexpr int kDepth = 8;
  static constexpr int kGroup = 4;

  static __device__ __forceinline__ void to_factor(uint32_t (&fragment)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      fragment[i] = ptx::round_to_tf32(detail::bit_cast<float>(fragment[i]));
    }
  }

  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    ptx::mma_m16n8k8_tf32(d, a, b, d);
  }

  static __device__ __forceinline__ void to_left(const float (*sums)[4], uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ptx::round_to_tf32((*sums)[i % 2 * 2 + i / 2]);
  }

  template <int kDim>
  struct Values {
    const float* rows;
    int even, odd;  // the chunk of the lane's column group g in rows 2t and 2t + 1

    __device__ __forceinline__ explicit Values(const float* values)
        : rows(values),
          even(chunk_offset<float, kDim>(threadIdx.x % 4 * 2, threadIdx.x % kWarpSize / 4)),
          odd(chunk_offset<float, kDim>(threadIdx.x % 4 * 2 + 1, threadIdx.x % kWarpSize / 4)) {}

    __device__ __forceinline__ void load(int k, int d, uint32_t (&b)[kGroup][2]) const {
      const float* from = rows + kDepth * k * kDim + d / kGroup * 32;
      const Pack<float> first = load_pack(from + even), second = load_pack(from + odd);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        b[i][0] = ptx::round_to_tf32(first.element[i]);
        b[i][1] = ptx::round_to_tf32(second.element[i]);
      }
    }
  };

  template <int kDim>
  static __device__ __forceinline__ void store_row(float* tile, int row, int half, float scale,
                                                   const float (&result)[kDim / 8][4]) {
#pragma unroll
    for (int chunk = 0; chunk < kDim / kChunk<float>; chunk += 8) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        Pack<float> pack;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          pack.element[i] = result[chunk / 2 + i][2 * half + side] * scale;
        }
        float* to = tile + chunk_offset<float, kDim>(row, chunk + threadIdx.x % 4 * 2 + side);
        *reinterpret_cast<Pack<float>*>(to) = pack;
      }
    }
  }
};

}  // namespace fused
