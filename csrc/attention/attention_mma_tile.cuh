// What the tensor-core kernels of attention are made of: swizzled tiles in shared memory, the two
// tile products, and the way of a result back to global memory. As in the portable kernels
// (attention_tile.cuh) a block owns rows of one operand ("own") and walks over the rows of another
// ("other"):
//
//   row_products       sums[i][j]   += own[i] . other[j]                   (scores, grad_out . v)
//   accumulate         result[i][:] += sum_j weights[i][j] * values[j][:]  (out, grad_q, ...)
//
// A warp has kM * 16 own rows. Of each 16 by 8 tile of sums lane l holds, with g = l / 4 and
// t = l % 4, the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1): two sums side by side
// are, rounded to 16 bits, the left operand of the second product, and nothing has to pass between
// the lanes (FlashAttention-2, arXiv:2307.08691, section 3.3).
#pragma once

#include "attention/attention_mma.h"
#include "attention/attention_mma_tiles.h"
#include "attention/attention_score.h"
#include "attention/attention_tile.cuh"
#include "common/launch.h"
#include "common/ptx.h"

namespace fused {

constexpr int kChunk = 8;  // elements of 16 bits in 16 bytes, the unit of every copy
constexpr float kLog2E = 1.44269504088896340736f;

// Where chunk `chunk` of row `row` lies in a tile of rows of kDim elements. The chunks of a row are
// exchanged among themselves so that eight rows have the same chunk in eight different groups of
// banks: ldmatrix then reads them at once. Where two rows share 128 bytes (kDim 32 or 96), each
// pair has its own order, and the two lie apart already.
template <int kDim>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(kDim % 32 == 0, "whole groups of four chunks");
  const int turn = kDim % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * kDim + (chunk ^ turn) * kChunk;
}

// Where chunk `chunk ^ step` of the row lies, given where `chunk`, 0 or 1, does: one register for
// all steps of a product, where each step's own would cost too many.
template <int kDim>
__device__ __forceinline__ int stepped(int offset, int step) {
  constexpr int kTurned = kDim % 64 == 0 ? 8 : 4;
  return (offset ^ (step % kTurned * kChunk)) + step / kTurned * kTurned * kChunk;
}

// Rows of a matrix, and the tile that they go to.
template <typename T>
struct Copy {
  HeadMatrix<T> from;
  T* to;
};

// Starts copying kRows rows of some matrices from first_row on, zeros beyond their rows and
// columns. Not unrolled: the addresses of many copies at once would cost registers, of which the
// kernels have none to spare.
template <int kRows, int kDim, int kThreads, typename... Copies>
__device__ __forceinline__ void copy_rows(int32_t first_row, const Copies&... copies) {
  constexpr int kChunks = kDim / kChunk;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int offset = chunk_offset<kDim>(i / kChunks, i % kChunks);
    const int32_t row = first_row + i / kChunks, column = i % kChunks * kChunk;
    const auto start = [&](const auto& copy) {
      const bool inside = row < copy.from.rows && column < copy.from.columns;
      // Of no bytes the address does not matter.
      ptx::cp_async_16(copy.to + offset, copy.from.data + row * copy.from.row_stride + column,
                       inside ? 16 : 0);
    };
    (start(copies), ...);
  }
}

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>) {
    ptx::mma_m16n8k16_f16(d, a, b, d);
  } else {
    ptx::mma_m16n8k16_bf16(d, a, b, d);
  }
}

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

// sums[m][n] of rows own_row + 16m .. and other rows 8n .. .
template <int kDim, int kM, int kN, typename T>
__device__ __forceinline__ void row_products(const T* own, int own_row, const T* other,
                                             float (&sums)[kM][kN][4]) {
  const int lane = threadIdx.x % kWarpSize;
  for_each_element<kM, kN>([&](int m, int n, int i) { sums[m][n][i] = 0; });
  const int own_offset = chunk_offset<kDim>(own_row + lane % 16, lane / 16);
  const int other_offset = chunk_offset<kDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ptx::ldmatrix<false>(a[m], own + 16 * m * kDim + stepped<kDim>(own_offset, 2 * k));
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix<false>(b, other + 8 * n * kDim + stepped<kDim>(other_offset, 2 * k));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(sums[m][n], a[m], first);
        mma<T>(sums[m][n + 1], a[m], second);
      }
    }
  }
}

// The left operand of accumulate: kN tiles of sums side by side, in the precision of T.
template <typename T, int kM, int kN>
__device__ __forceinline__ void to_weights(const float (&sums)[kM][kN][4],
                                           uint32_t (&weights)[kM][kN / 2][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kN / 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&from)[4] = sums[m][2 * k + i / 2];
        weights[m][k][i] = store_pair<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
  }
}

// result += weights times the rows of `values`, of which there are kN * 8. Column by column: were
// it row by row, the compiler would begin with the first rows while it still computes the weights
// of the last, and spill.
template <int kDim, int kM, int kHalfN, typename T>
__device__ __forceinline__ void accumulate(const uint32_t (&weights)[kM][kHalfN][4],
                                           const T* values, float (&result)[kM][kDim / 8][4]) {
  const int lane = threadIdx.x % kWarpSize;
  const int offset = chunk_offset<kDim>(lane % 16, lane / 16);
#pragma unroll
  for (int d = 0; d < kDim / 8; d += 2) {
#pragma unroll
    for (int k = 0; k < kHalfN; ++k) {
      uint32_t b[4];
      ptx::ldmatrix<true>(b, values + 16 * k * kDim + stepped<kDim>(offset, d));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(result[m][d], weights[m][k], first);
        mma<T>(result[m][d + 1], weights[m][k], second);
      }
    }
  }
}

// Writes the warp's rows of the result, scaled by scale[m][half], by way of `own`, whose rows of
// this warp nobody else reads, so that global memory is written 16 bytes at a time.
template <int kDim, int kM, typename T>
__device__ __forceinline__ void store_rows(const HeadMatrix<T>& matrix, int32_t first_row, T* own,
                                           int warp_row, const float (&result)[kM][kDim / 8][4],
                                           const float (&scale)[kM][2]) {
  constexpr int kChunks = kDim / kChunk;
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();  // all lanes have read what they needed of these rows
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + lane / 4 + 8 * half;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        *reinterpret_cast<uint32_t*>(own + chunk_offset<kDim>(row, d) + lane % 4 * 2) =
            store_pair<T>(result[m][d][2 * half] * scale[m][half],
                          result[m][d][2 * half + 1] * scale[m][half]);
      }
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < 16 * kM * kChunks; i += kWarpSize) {
    const int row = warp_row + i / kChunks, chunk = i % kChunks;
    if (first_row + row < matrix.rows && chunk * kChunk < matrix.columns) {
      T* target = const_cast<T*>(matrix.data) + (first_row + row) * matrix.row_stride;
      *reinterpret_cast<Pack<T>*>(target + chunk * kChunk) =
          load_pack(own + chunk_offset<kDim>(row, chunk));
    }
  }
}

// Where a block works: one tile of own rows of one head of a sequence.
struct MmaPlace {
  Sequence sequence;
  int32_t head, own_row;
};

inline int64_t mma_blocks(const AttentionProblem& p, bool owns_queries, int32_t own) {
  return int64_t{p.batch} * (owns_queries ? p.num_heads : p.num_heads_kv) *
         num_tile_slots(p, owns_queries, own);
}

// The last rows first: under a causal mask they have the most to do, and nobody waits for them in
// the end. A block whose own_row lies behind its sequence has nothing to do.
template <int kOwnRows>
__device__ __forceinline__ MmaPlace mma_place(const AttentionProblem& p, bool owns_queries) {
  const unsigned heads = owns_queries ? p.num_heads : p.num_heads_kv;
  const unsigned slots = static_cast<unsigned>(num_tile_slots(p, owns_queries, kOwnRows));
  const unsigned head_of_all = blockIdx.x / slots;
  const OwnTile tile = own_tile(p, owns_queries, static_cast<int32_t>(head_of_all / heads),
                                static_cast<int32_t>(slots - 1 - blockIdx.x % slots), kOwnRows);
  return {tile.sequence, static_cast<int32_t>(head_of_all % heads), tile.row};
}

struct Span {
  int32_t first, last;
};

// What some rows see of some keys.
enum class Sight { kNothing, kSome, kAll };

__device__ __forceinline__ Sight sight(const Band& band, const Span& rows, const Span& keys) {
  const bool none = rows.last < rows.first || keys.last < keys.first;
  const int32_t nearest = keys.first - rows.last, furthest = keys.last - rows.first;
  if (none || nearest > band.high || furthest < band.low) return Sight::kNothing;
  return nearest >= band.low && furthest <= band.high ? Sight::kAll : Sight::kSome;
}

// exp(score - max) in base 2, which is what the hardware has: one multiply-add and one instruction.
// Given max * log2(e), rounded once for all of a row; what that takes from each of the row's
// weights, rounding_factor gives back, once.
__device__ __forceinline__ float exp_below(float score, float max_log2) {
  return ptx::exp2_approx(std::fma(score, kLog2E, -max_log2));
}
__device__ __forceinline__ float rounding_factor(float max, float max_log2) {
  return ptx::exp2_approx(-std::fma(max, kLog2E, -max_log2));
}

}  // namespace fused
