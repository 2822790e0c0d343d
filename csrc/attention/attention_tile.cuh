// The two tile products that all attention kernels are made of, on the portable FMA units.
//
// A block of 256 threads owns kOwn rows of one operand ("own") and walks over the rows of another
// ("other") in tiles of kOther. In the forward pass and for grad_q, own rows are queries and other
// rows are keys; for grad_k and grad_v it is the other way round:
//
//   pair_products      sums[i][j]   = own[i] . other[j]                    (scores, grad_out . v)
//   accumulate         result[i][:] += sum_j weights[i][j] * values[j][:]  (out, grad_q, ...)
//
// Thread t has the position (t / 16, t % 16): rows 4 * (t / 16) .. + 3 of the own tile, and of the
// 16 positions along a row, columns p and p + 16 of the scores, 4 * p .. + 3 of the result. A warp
// so holds 8 whole rows of both, and what passes between the two products by way of shared memory
// stays within the warp.
#pragma once

#include "attention/attention_sequence.h"
#include "common/launch.h"
#include "common/vector_load.cuh"
#include "common/warp.cuh"

namespace fused {

constexpr int kAttentionThreads = 256;
constexpr int kOwn = 64;            // own rows of a block
constexpr int kOther = 32;          // other rows of a tile: one for each lane in the softmax
constexpr int kDepth = 32;          // elements of the head dim that pair_products stages at a time
constexpr int kWidth = 64;          // columns of the result that a block computes
constexpr int kPitch = kDepth + 1;  // odd, so that walking down a column meets all banks
constexpr int kRowsPerThread = 4;
constexpr int kColumnsPerThread = 2;
constexpr int kValuesPerThread = 4;
static_assert(kOther == kWarpSize && kDepth == kOther, "own and weights tiles have the same pitch");

// The rows of a sequence in one head of an operand.
template <typename T>
struct HeadMatrix {
  const T* data;
  int64_t row_stride;
  int32_t rows, columns;

  __device__ __forceinline__ bool is_aligned() const { return is_pack_aligned(data, row_stride); }
  __device__ __forceinline__ const T* row(int32_t index) const { return data + index * row_stride; }
};

// The same of a cache in pages.
template <typename T>
struct PagedMatrix {
  const T* data;
  int64_t row_stride, page_stride;
  const int32_t* pages;
  int32_t page_size, rows, columns;

  __device__ __forceinline__ bool is_aligned() const {
    return is_pack_aligned(data, row_stride) && is_pack_aligned(data, page_stride);
  }
  __device__ __forceinline__ const T* row(int32_t index) const {
    if (index >= rows) return data;  // has no page, and nobody reads it
    return data + pages[index / page_size] * page_stride + index % page_size * row_stride;
  }
};

template <typename T>
__device__ __forceinline__ HeadMatrix<T> query_matrix(const void* data, const HeadStrides& strides,
                                                      const Sequence& sequence, int32_t head,
                                                      int32_t columns) {
  return {query_rows(static_cast<const T*>(data), strides, sequence, head), strides.row,
          sequence.seqlen_q, columns};
}
template <typename T>
__device__ __forceinline__ HeadMatrix<T> key_matrix(const void* data, const HeadStrides& strides,
                                                    const Sequence& sequence, int32_t head,
                                                    int32_t columns) {
  return {key_rows(static_cast<const T*>(data), strides, sequence, head), strides.row,
          sequence.seqlen_k, columns};
}

// The keys or values of a sequence, side by side or in pages.
template <bool kPaged, typename T>
__device__ __forceinline__ auto cache_matrix(const AttentionProblem& p, const void* data,
                                             const HeadStrides& strides, const Sequence& sequence,
                                             int32_t head, int32_t columns) {
  if constexpr (kPaged) {
    return PagedMatrix<T>{
        static_cast<const T*>(data) + head * strides.head,
        strides.row,
        strides.batch,
        p.maybe_block_table + static_cast<int64_t>(sequence.index) * p.pages_of_sequence,
        p.page_size,
        sequence.seqlen_k,
        columns};
  } else {
    return key_matrix<T>(data, strides, sequence, head, columns);
  }
}

// The block's shared memory: 29 KB in float, 58 KB in double, which sm_75 can still give.
template <typename A>
struct AttentionTiles {
  A own[kOwn][kPitch];
  A other[kOther][kPitch];
  A weights[kOwn][kPitch];
  A values[kOther][kWidth];
};

// Stages rows [row, row + kRows) and columns [column, column + kColumns) of `matrix` in
// tile[kRows][pitch]; zeros where the matrix ends.
template <int kRows, int kColumns, typename T, typename A, template <typename> class Matrix>
__device__ __forceinline__ void load_tile(A* tile, int pitch, const Matrix<T>& matrix, int32_t row,
                                          int32_t column) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kPacksPerRow = kColumns / kSize;
  const bool aligned = matrix.is_aligned();
  for (int i = threadIdx.x; i < kRows * kPacksPerRow; i += kAttentionThreads) {
    const int tile_row = i / kPacksPerRow, tile_column = i % kPacksPerRow * kSize;
    const int32_t inside = row + tile_row < matrix.rows ? matrix.columns - column - tile_column : 0;
    const T* source = matrix.row(row + tile_row) + column + tile_column;
    const Pack<T> pack =
        aligned && inside >= kSize ? load_pack(source) : load_pack_partly(source, inside);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      tile[tile_row * pitch + tile_column + e] = load(pack.element[e]);
    }
  }
}

// Calls visit(r, c, i, j) for each of the thread's scores: [r][c] of its own, [i][j] of the tile.
template <typename Visit>
__device__ __forceinline__ void for_each_score(Visit visit) {
  const int thread_row = threadIdx.x / 16 * kRowsPerThread, thread_column = threadIdx.x % 16;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) visit(r, c, thread_row + r, thread_column + 16 * c);
  }
}

// sums[r][c] += own[own_row + 4 * (t / 16) + r] . other[other_row + t % 16 + 16 * c].
template <typename T, typename A, template <typename> class Matrix>
__device__ __forceinline__ void add_pair_products(AttentionTiles<A>& tiles,
                                                  const HeadMatrix<T>& own, int32_t own_row,
                                                  const Matrix<T>& other, int32_t other_row,
                                                  A (&sums)[kRowsPerThread][kColumnsPerThread]) {
  for (int32_t depth = 0; depth < own.columns; depth += kDepth) {
    __syncthreads();  // everyone is done with the tiles of the step before
    load_tile<kOwn, kDepth>(&tiles.own[0][0], kPitch, own, own_row, depth);
    load_tile<kOther, kDepth>(&tiles.other[0][0], kPitch, other, other_row, depth);
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) {
      for_each_score(
          [&](int r, int c, int i, int j) { sums[r][c] += tiles.own[i][d] * tiles.other[j][d]; });
    }
  }
}

// The same, not added to anything.
template <typename T, typename A, template <typename> class Matrix>
__device__ __forceinline__ void pair_products(AttentionTiles<A>& tiles, const HeadMatrix<T>& own,
                                              int32_t own_row, const Matrix<T>& other,
                                              int32_t other_row,
                                              A (&sums)[kRowsPerThread][kColumnsPerThread]) {
  for_each_score([&](int r, int c, int, int) { sums[r][c] = 0; });
  add_pair_products(tiles, own, own_row, other, other_row, sums);
}

// result[r][e] += sum_j weights[4 * (t / 16) + r][j] * tiles.values[j][4 * (t % 16) + e].
template <typename A>
__device__ __forceinline__ void accumulate_staged(const AttentionTiles<A>& tiles,
                                                  const A (&weights)[kOwn][kPitch],
                                                  A (&result)[kRowsPerThread][kValuesPerThread]) {
  const int thread_row = threadIdx.x / 16 * kRowsPerThread;
  const int thread_column = threadIdx.x % 16 * kValuesPerThread;
#pragma unroll 4
  for (int j = 0; j < kOther; ++j) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int e = 0; e < kValuesPerThread; ++e) {
        result[r][e] += weights[thread_row + r][j] * tiles.values[j][thread_column + e];
      }
    }
  }
}

// result[r][e] += sum_j tiles.weights[4 * (t / 16) + r][j] * values[value_row + j][column + 4p +
// e]. Stages the values itself: pair_products has passed a barrier since they were last read.
template <typename T, typename A, template <typename> class Matrix>
__device__ __forceinline__ void accumulate(AttentionTiles<A>& tiles, const Matrix<T>& values,
                                           int32_t value_row, int32_t column,
                                           A (&result)[kRowsPerThread][kValuesPerThread]) {
  load_tile<kOther, kWidth>(&tiles.values[0][0], kWidth, values, value_row, column);
  __syncthreads();  // also orders this warp's weights before their use
  accumulate_staged(tiles, tiles.weights, result);
}

// Writes the thread's part of the result to a sequence's `rows` by `columns`, rows scaled by
// row_scale[r], where it lies inside.
template <typename T, typename A>
__device__ __forceinline__ void store_result(T* matrix, int64_t row_stride, int32_t own_row,
                                             int32_t rows, int32_t column, int32_t columns,
                                             const A (&result)[kRowsPerThread][kValuesPerThread],
                                             const A (&row_scale)[kRowsPerThread]) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int32_t row = own_row + threadIdx.x / 16 * kRowsPerThread + r;
#pragma unroll
    for (int e = 0; e < kValuesPerThread; ++e) {
      const int32_t c = column + threadIdx.x % 16 * kValuesPerThread + e;
      if (row < rows && c < columns) {
        matrix[row * row_stride + c] = store<T>(result[r][e] * row_scale[r]);
      }
    }
  }
}

// Where a block works. All blocks of a launch lie along x, which has room for 2^31 - 1 of them.
struct BlockPlace {
  Sequence sequence;
  int32_t head, own_row, column;
};

inline int64_t num_blocks(const AttentionProblem& p, bool owns_queries, int32_t columns) {
  return int64_t{p.batch} * (owns_queries ? p.num_heads : p.num_heads_kv) *
         ((columns + kWidth - 1) / kWidth) * num_tile_slots(p, owns_queries, kOwn);
}

// A block whose own_row lies behind its sequence has nothing to do.
__device__ __forceinline__ BlockPlace block_place(const AttentionProblem& p, bool owns_queries,
                                                  int32_t columns) {
  const unsigned heads = owns_queries ? p.num_heads : p.num_heads_kv;
  const unsigned slots = static_cast<unsigned>(num_tile_slots(p, owns_queries, kOwn));
  const unsigned column_tiles = (columns + kWidth - 1) / kWidth;
  unsigned index = blockIdx.x;
  BlockPlace place;
  const unsigned slot = index % slots;
  index /= slots;
  place.column = static_cast<int32_t>(index % column_tiles) * kWidth;
  index /= column_tiles;
  place.head = static_cast<int32_t>(index % heads);
  const OwnTile tile = own_tile(p, owns_queries, static_cast<int32_t>(index / heads),
                                static_cast<int32_t>(slot), kOwn);
  place.sequence = tile.sequence;
  place.own_row = tile.row;
  return place;
}

}  // namespace fused
