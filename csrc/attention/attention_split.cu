// Attention forward for a query or a few, as in decoding: bound by the reading of keys and values.
//
// A block takes kSplitKeys keys of one key head and up to kRows rows of the query heads that share
// it, so that one sequence fills the machine and keys and values come from memory once. Row r of a
// group is query r % S of its head r / S. The block leaves sum(exp(score - max) * v), max and
// sum(exp(score - max)); a second kernel, a block for each row, puts a row's chunks together in
// their order (Dao et al., Flash-Decoding, pytorch.org/blog/flash-decoding, 2023).
//
// A row of keys or values is read by the fewest lanes, a power of two, that have a pack each; the
// other lanes of the warp have the next rows.
#include <algorithm>

#include "attention/attention_score.h"
#include "attention/attention_split.h"
#include "attention/attention_tile.cuh"

namespace fused {
namespace {

constexpr int kSplitThreads = 128;
constexpr int kSplitWarps = kSplitThreads / kWarpSize;
constexpr int kSplitBlocks = 4;  // of a multiprocessor: for more the compiler would rather spill

// Sums of a warp are of so many columns at a time.
template <typename T>
constexpr int kSplitColumns = kWarpSize * Pack<T>::kSize;

template <typename T, int kRows>
struct SplitMemory {
  using A = Accumulator<T>;
  A q[kRows][kMaxHeadDim];       // zeros behind the head dim
  A weights[kRows][kSplitKeys];  // the scores, then exp(score - max)
  A sums[kSplitWarps][kRows][kSplitColumns<T>];
};

// The rows of the query heads that share a key head, and a chunk of the keys that any of them sees.
struct SplitPlace {
  Sequence sequence;
  Band band;
  int32_t head_kv, first_row, num_rows;
  Range keys;
};

// With no rows or no keys for a block that has nothing to do.
__device__ __forceinline__ SplitPlace split_place(const AttentionProblem& p, int32_t rows) {
  const unsigned tiles = static_cast<unsigned>((num_split_rows(p) + rows - 1) / rows);
  const unsigned slots = static_cast<unsigned>(num_tile_slots(p, false, kSplitKeys));
  const unsigned head_of_all = blockIdx.x / tiles / slots;
  const OwnTile tile = own_tile(p, false, static_cast<int32_t>(head_of_all / p.num_heads_kv),
                                static_cast<int32_t>(blockIdx.x / tiles % slots), kSplitKeys);
  SplitPlace place;
  place.sequence = tile.sequence;
  place.band = visible_band(p, tile.sequence);
  place.head_kv = static_cast<int32_t>(head_of_all % p.num_heads_kv);
  place.first_row = static_cast<int32_t>(blockIdx.x % tiles) * rows;
  place.num_rows = has_few_queries(tile.sequence) ? group_size(p) * tile.sequence.seqlen_q : 0;
  const Range seen = keys_seen_by(tile.sequence, place.band, 0, tile.sequence.seqlen_q - 1);
  place.keys = {max(seen.begin, tile.row), min(seen.end, tile.row + kSplitKeys)};
  return place;
}

// Row first_row + r of the group, if there is one.
struct GroupRow {
  int32_t head, query;
  bool exists;
};
__device__ __forceinline__ GroupRow group_row(const AttentionProblem& p, const SplitPlace& place,
                                              int r) {
  const int32_t row = place.first_row + r, queries = place.sequence.seqlen_q;
  return {place.head_kv * group_size(p) + row / queries, row % queries, row < place.num_rows};
}

// Where the share that a chunk of keys has in a row of a group lies: [Dv] sums, the maximum, the
// sum of the weights.
template <typename A>
__device__ __forceinline__ A* partial_of(const AttentionForwardParams& p, const Sequence& sequence,
                                         int32_t head_kv, int32_t chunk, int32_t row) {
  const int32_t slots = static_cast<int32_t>(num_tile_slots(p, false, kSplitKeys));
  // Inside, whatever cu_seqlens says.
  const int32_t slot = min(first_key_slot(p, sequence, kSplitKeys) + chunk, slots - 1);
  const int64_t head_of_all = static_cast<int64_t>(sequence.batch) * p.num_heads_kv + head_kv;
  return static_cast<A*>(p.maybe_partials) +
         ((head_of_all * slots + slot) * num_split_rows(p) + row) * (p.head_dim_v + 2);
}

// The power of two of lanes that have a pack of `columns` each, at most a warp.
template <typename T>
__device__ __forceinline__ int lanes_of_row(int32_t columns) {
  int lanes = 1;
  while (lanes < kWarpSize && lanes * Pack<T>::kSize < columns) lanes *= 2;
  return lanes;
}

// One pack of row `row`, from column `column` on. (load_tile has the same in its own words: by a
// call of this the other kernels would spill.)
template <typename T, template <typename> class Matrix>
__device__ __forceinline__ Pack<T> load_part(const Matrix<T>& matrix, bool aligned, int32_t row,
                                             int32_t column) {
  const int32_t inside = matrix.columns - column;
  const T* source = matrix.row(row) + column;
  return aligned && inside >= Pack<T>::kSize ? load_pack(source) : load_pack_partly(source, inside);
}

// memory.weights[r][j] = the score of row first_row + r for key keys.begin + j.
template <int kRows, typename T, template <typename> class Matrix>
__device__ __forceinline__ void split_scores(const AttentionForwardParams& p,
                                             const SplitPlace& place, const Matrix<T>& k,
                                             SplitMemory<T, kRows>& memory) {
  using A = Accumulator<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int lanes = lanes_of_row<T>(k.columns), lane = threadIdx.x % lanes;
  const bool aligned = k.is_aligned();
  const int32_t count = place.keys.end - place.keys.begin;
  // All lanes of a warp go round as often, for the sums below are theirs together.
  for (int32_t first = 0; first < count; first += kSplitThreads / lanes) {
    const int32_t j = first + static_cast<int32_t>(threadIdx.x) / lanes;
    A sums[kRows] = {};
    for (int32_t column = lane * kSize; j < count && column < k.columns; column += lanes * kSize) {
      const Pack<T> pack = load_part(k, aligned, place.keys.begin + j, column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[r] += memory.q[r][column + e] * load(pack.element[e]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        const A other = __shfl_xor_sync(kFullWarp, sums[r], offset);
        sums[r] += offset < lanes ? other : A(0);
      }
      if (j >= count || lane != r % lanes) continue;
      const GroupRow row = group_row(p, place, r);
      memory.weights[r][j] = row.exists ? final_score(p, place.sequence, place.band, row.head,
                                                      row.query, place.keys.begin + j, sums[r])
                                              .value
                                        : kHiddenScore<A>;
    }
  }
}

// Turns the scores of a row into weights, by one warp. Leaves their maximum and sum in `partial`.
template <int kRows, typename T>
__device__ __forceinline__ void split_softmax(const AttentionForwardParams& p,
                                              const SplitPlace& place, int r,
                                              SplitMemory<T, kRows>& memory,
                                              Accumulator<T>* partial) {
  using A = Accumulator<T>;
  constexpr int kSteps = kSplitKeys / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int32_t count = place.keys.end - place.keys.begin;
  const GroupRow row = group_row(p, place, r);
  A score[kSteps], max = kHiddenScore<A>;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int32_t j = i * kWarpSize + lane;
    score[i] = j < count ? memory.weights[r][j] : kHiddenScore<A>;
    max = max_or_nan(max, score[i]);
  }
  max = warp_max(max);
  // A row that sees none of these keys has no maximum: anything finite will do, its weights are 0.
  const A shift = max == kHiddenScore<A> ? A(0) : max;
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int32_t j = i * kWarpSize + lane;
    A weight = exp(score[i] - shift);
    sum += weight;
    if (p.maybe_rng != nullptr && j < count && row.exists) {
      weight *= dropout_scale<A>(p, place.sequence, row.head, row.query, place.keys.begin + j);
    }
    memory.weights[r][j] = weight;
  }
  sum = warp_sum(sum);
  if (lane == 0 && row.exists) {
    partial[p.head_dim_v] = max;
    partial[p.head_dim_v + 1] = sum;
  }
}

// The sums of weights times values, column by column, into the partials of the block's rows.
template <int kRows, typename T, template <typename> class Matrix>
__device__ __forceinline__ void split_values(const SplitPlace& place, const Matrix<T>& v,
                                             SplitMemory<T, kRows>& memory,
                                             Accumulator<T>* partials) {
  using A = Accumulator<T>;
  constexpr int kSize = Pack<T>::kSize, kColumns = kSplitColumns<T>;
  const bool aligned = v.is_aligned();
  const int32_t count = place.keys.end - place.keys.begin;
  for (int32_t first = 0; first < v.columns; first += kColumns) {
    const int32_t columns = min(kColumns, v.columns - first);
    const int lanes = lanes_of_row<T>(columns), lane = threadIdx.x % lanes;
    A sums[kRows][kSize] = {};
    for (int32_t j = threadIdx.x / lanes; j < count; j += kSplitThreads / lanes) {
      const Pack<T> pack = load_part(v, aligned, place.keys.begin + j, first + lane * kSize);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const A weight = memory.weights[r][j];
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[r][e] += weight * load(pack.element[e]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
          const A other = __shfl_xor_sync(kFullWarp, sums[r][e], offset);
          sums[r][e] += offset >= lanes ? other : A(0);
        }
        if (threadIdx.x % kWarpSize < lanes) {
          memory.sums[threadIdx.x / kWarpSize][r][lane * kSize + e] = sums[r][e];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * columns; i += kSplitThreads) {
      const int32_t r = i / columns, column = i % columns;
      A sum = 0;
#pragma unroll
      for (int w = 0; w < kSplitWarps; ++w) sum += memory.sums[w][r][column];
      if (place.first_row + r < place.num_rows) {
        partials[static_cast<int64_t>(r) * (v.columns + 2) + first + column] = sum;
      }
    }
    __syncthreads();  // the sums of the next columns go where these were
  }
}

template <typename T, int kRows, bool kPaged>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    attention_split_kernel(const AttentionForwardParams p) {
  using A = Accumulator<T>;
  static_assert(kRows <= kSplitWarps, "each row's softmax is one warp's");
  auto& memory = *shared_memory<SplitMemory<T, kRows>>();
  const SplitPlace place = split_place(p, kRows);
  // Where there are no keys the second kernel does not look.
  if (place.first_row >= place.num_rows || place.keys.end <= place.keys.begin) return;
  const Sequence& sequence = place.sequence;
  const auto k = cache_matrix<kPaged, T>(p, p.k, p.k_strides, sequence, place.head_kv, p.head_dim);
  const auto v =
      cache_matrix<kPaged, T>(p, p.v, p.v_strides, sequence, place.head_kv, p.head_dim_v);

  for (int r = 0; r < kRows; ++r) {
    const GroupRow row = group_row(p, place, r);
    const auto q = query_matrix<T>(p.q, p.q_strides, sequence, row.head, p.head_dim);
    for (int32_t d = threadIdx.x; d < p.head_dim + Pack<T>::kSize - 1; d += kSplitThreads) {
      if (d < kMaxHeadDim) {
        memory.q[r][d] = row.exists && d < p.head_dim ? load(q.row(row.query)[d]) : A(0);
      }
    }
  }
  __syncthreads();
  split_scores(p, place, k, memory);
  __syncthreads();
  A* const partials =
      partial_of<A>(p, sequence, place.head_kv, place.keys.begin / kSplitKeys, place.first_row);
  const int warp = threadIdx.x / kWarpSize;
  if (warp < kRows) {
    split_softmax(p, place, warp, memory, partials + int64_t{warp} * (p.head_dim_v + 2));
  }
  __syncthreads();
  split_values(place, v, memory, partials);
}

// One block for each row of each query head that a sequence may have.
template <typename T>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    attention_split_merge_kernel(const AttentionForwardParams p) {
  using A = Accumulator<T>;
  constexpr int kColumns = kMaxHeadDim / kSplitThreads;  // of a thread
  A* const factors = shared_memory<A>();                 // [kSplitThreads], then their sums
  A* const sums = factors + kSplitThreads;
  const int32_t most_rows = min(p.seqlen_q, kFewQueries);
  const int32_t row = static_cast<int32_t>(blockIdx.x % most_rows);
  const int32_t head = static_cast<int32_t>(blockIdx.x / most_rows % p.num_heads);
  const Sequence sequence =
      sequence_of(p, static_cast<int32_t>(blockIdx.x / most_rows / p.num_heads));
  if (row >= sequence.seqlen_q || !has_few_queries(sequence)) return;
  const Range seen = keys_seen_by(sequence, visible_band(p, sequence), 0, sequence.seqlen_q - 1);
  const int32_t group = group_size(p);
  const int32_t begin = seen.begin / kSplitKeys;
  const int32_t end = seen.end > seen.begin ? (seen.end - 1) / kSplitKeys + 1 : begin;
  const int64_t stride = int64_t{num_split_rows(p)} * (p.head_dim_v + 2);  // between chunks
  const A* const partials =
      partial_of<A>(p, sequence, head / group, 0, head % group * sequence.seqlen_q + row);
  const A* const stats = partials + p.head_dim_v;

  A max = kHiddenScore<A>;
  for (int32_t split = begin + static_cast<int32_t>(threadIdx.x); split < end;
       split += kSplitThreads) {
    max = max_or_nan(max, stats[split * stride]);
  }
  max = warp_max(max);
  if (threadIdx.x % kWarpSize == 0) factors[threadIdx.x / kWarpSize] = max;
  __syncthreads();
  for (int w = 0; w < kSplitWarps; ++w) {
    max = max_or_nan(max, factors[w]);
  }
  const A shift = max == kHiddenScore<A> ? A(0) : max;

  A result[kColumns] = {}, sum = 0;
  for (int32_t first = begin; first < end; first += kSplitThreads) {
    __syncthreads();  // everyone is done with what lies there
    const int32_t split = first + static_cast<int32_t>(threadIdx.x);
    if (split < end) {
      factors[threadIdx.x] = exp(stats[split * stride] - shift);
      sums[threadIdx.x] = stats[split * stride + 1];
    }
    __syncthreads();
    for (int32_t i = 0; i < min(kSplitThreads, end - first); ++i) {
      sum += factors[i] * sums[i];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int32_t column = c * kSplitThreads + static_cast<int32_t>(threadIdx.x);
        if (column < p.head_dim_v)
          result[c] += factors[i] * partials[(first + i) * stride + column];
      }
    }
  }
  const RowEnd<A> row_end = end_row(p, head, max, sum);
  if (threadIdx.x == 0) store_row_end(p, row_of_all(p, sequence, head, row), row_end);
  T* out =
      query_rows(static_cast<T*>(p.out), p.out_strides, sequence, head) + row * p.out_strides.row;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int32_t column = c * kSplitThreads + static_cast<int32_t>(threadIdx.x);
    if (column < p.head_dim_v) out[column] = store<T>(result[c] * row_end.scale);
  }
}

template <typename T, int kRows>
Status launch_split(const AttentionForwardParams& p, Stream stream) {
  const int64_t blocks = int64_t{p.batch} * p.num_heads_kv * num_tile_slots(p, false, kSplitKeys) *
                         ((num_split_rows(p) + kRows - 1) / kRows);
  const int64_t merge_blocks =
      num_sequences_and_rest(p) * p.num_heads * std::min(p.seqlen_q, kFewQueries);
  if (blocks > INT32_MAX || merge_blocks > INT32_MAX) {
    return "the problem needs 2^31 blocks or more";
  }
  const auto kernel = p.maybe_block_table != nullptr ? attention_split_kernel<T, kRows, true>
                                                     : attention_split_kernel<T, kRows, false>;
  const Status status = launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSplitThreads),
                               sizeof(SplitMemory<T, kRows>), stream, p);
  if (status != nullptr) return status;
  return launch(attention_split_merge_kernel<T>, dim3(static_cast<unsigned>(merge_blocks)),
                dim3(kSplitThreads), 2 * kSplitThreads * sizeof(Accumulator<T>), stream, p);
}

}  // namespace

Status attention_split_forward(const AttentionForwardParams& params, Stream stream) {
  return visit_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    return num_split_rows(params) == 1 ? launch_split<T, 1>(params, stream)
                                       : launch_split<T, 4>(params, stream);
  });
}

}  // namespace fused
