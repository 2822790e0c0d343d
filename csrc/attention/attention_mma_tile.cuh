// What the tensor-core kernels of attention are made of: swizzled tiles in shared memory, the two
// tile products, and the way of a result back to global memory. As in the portable kernels
// (attention_tile.cuh) a block owns rows of one operand ("own") and walks over the rows of another
// ("other"):
//
//   row_products       sums[i][j]   += own[i] . other[j]                   (scores, grad_out . v)
//   accumulate         result[i][:] += sum_j weights[i][j] * values[j][:]  (out, grad_q, ...)
//
// A warp has kM * 16 own rows. Of each 16 by 8 tile of sums lane l holds, with g = l / 4 and
// t = l % 4, the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1): sums are, rounded,
// the left operand of the second product, and nothing has to pass between the lanes
// (FlashAttention-2, arXiv:2307.08691, section 3.3). attention_mma_element.cuh says how, for each
// element type.
#pragma once

#include "attention/attention_mma.h"
#include "attention/attention_mma_tiles.h"
#include "attention/attention_score.h"
#include "attention/attention_tile.cuh"
#include "common/launch.h"
#include "common/mma_tile.cuh"

namespace fused {

constexpr float kLog2E = 1.44269504088896340736f;

// Rows of a matrix, and the tile that they go to.
template <typename T, template <typename> class Matrix>
struct Copy {
  Matrix<T> from;
  T* to;
};
template <typename T, template <typename> class Matrix>
Copy(Matrix<T>, T*) -> Copy<T, Matrix>;

// Starts copying kRows rows of some matrices from first_row on, zeros beyond their rows and
// columns. Not unrolled: the addresses of many copies at once would cost registers, of which the
// kernels have none to spare.
template <int kRows, int kDim, int kThreads, typename T, template <typename> class Matrix,
          typename... More>
__device__ __forceinline__ void copy_rows(int32_t first_row, const Copy<T, Matrix>& first,
                                          const More&... more) {
  constexpr int kChunks = kDim / kChunk<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int offset = chunk_offset<T, kDim>(i / kChunks, i % kChunks);
    const int32_t row = first_row + i / kChunks, column = i % kChunks * kChunk<T>;
    const auto start = [&](const Copy<T, Matrix>& copy) {
      const bool inside = row < copy.from.rows && column < copy.from.columns;
      // Of no bytes the address does not matter.
      ptx::cp_async_16(copy.to + offset, copy.from.row(row) + column, inside ? 16 : 0);
    };
    start(first);
    (start(more), ...);
  }
}

// Tiles of sums as the left operand of accumulate, in the precision of products.
template <typename T, int kM, int kN>
using Weights = uint32_t[kM][kN * 8 / MmaElement<T>::kDepth][4];

template <typename T, int kM, int kN>
__device__ __forceinline__ void to_weights(const float (&sums)[kM][kN][4],
                                           Weights<T, kM, kN>& weights) {
  constexpr int kTiles = MmaElement<T>::kDepth / 8;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kN / kTiles; ++k) {
      MmaElement<T>::to_left(&sums[m][kTiles * k], weights[m][k]);
    }
  }
}

// result += weights times the rows of `values`, of which there are kDepths * kDepth. Column by
// column: were it row by row, the compiler would begin with the first rows while it still computes
// the weights of the last, and spill.
template <int kDim, int kM, int kDepths, typename T>
__device__ __forceinline__ void accumulate(const uint32_t (&weights)[kM][kDepths][4],
                                           const T* values, float (&result)[kM][kDim / 8][4]) {
  using Element = MmaElement<T>;
  const typename Element::template Values<kDim> right(values);
#pragma unroll
  for (int d = 0; d < kDim / 8; d += Element::kGroup) {
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
      uint32_t b[Element::kGroup][2];
      right.load(k, d, b);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < Element::kGroup; ++i) {
          Element::mma(result[m][d + i], weights[m][k], b[i]);
        }
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
  constexpr int kChunks = kDim / kChunk<T>;
  const int lane = threadIdx.x % kWarpSize;
  __syncwarp();  // all lanes have read what they needed of these rows
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      MmaElement<T>::template store_row<kDim>(own, warp_row + row_of_element(m, 2 * half), half,
                                              scale[m][half], result[m]);
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < 16 * kM * kChunks; i += kWarpSize) {
    const int row = warp_row + i / kChunks, chunk = i % kChunks;
    if (first_row + row < matrix.rows && chunk * kChunk<T> < matrix.columns) {
      T* target = const_cast<T*>(matrix.row(first_row + row));
      *reinterpret_cast<Pack<T>*>(target + chunk * kChunk<T>) =
          load_pack(own + chunk_offset<T, kDim>(row, chunk));
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

// exp(unit * (score - max)) in base 2, which is what the hardware has, given unit * log2(e). The
// difference comes first, though max * log2(e), rounded once, would save an instruction: of a row
// whose first keys a mask puts at -1e9, the rounding alone is beyond what float16 holds.
__device__ __forceinline__ float exp_below(float score, float max, float unit_log2 = kLog2E) {
  return ptx::exp2_approx((score - max) * unit_log2);
}

}  // namespace fused
