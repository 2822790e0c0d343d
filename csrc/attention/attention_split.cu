// Attention forward for a query or a few, as in decoding: bound by the reading of keys and values.
//
// A block takes kSplitKeys keys of one key head and up to kRows rows of the query heads that share
// it, so that one sequence fills the machine and keys and values come from memory once. Row r of a
// group is query r % S of its head r / S. The block leaves sum(exp(score - max) * v), max and
// sum(exp(score - max)); a second kernel, a block for each row, puts a row's chunks together in
// their order (Dao et al., Flash-Decoding, pytorch.org/blog/flash-decoding, 2023).
//
// A row of keys or values is read by the fewest lanes, a power of two, that have a pack each; the
// other lanes of the warp have the next rows. Each asks for several packs before it uses one: with
// one at a time on their way, memory would wait for the threads.
#include <algorithm>

#include "attention/attention_score.h"
#include "attention/attention_split.h"
#include "attention/attention_tile.cuh"

namespace fused {
namespace {

constexpr int kSplitThreads = 128;
constexpr int kSplitWarps = kSplitThreads / kWarpSize;
constexpr int kSplitBlocks = 4;  // of a multiprocessor: for more the compiler would rather spill
constexpr int kSplitAhead = 4;   // packs of a thread that are on their way together
// What a warp of the second kernel takes at a time: chunks, as many as there are registers for, and
// columns of their sums.
template <typename A>
constexpr int kMergeChunks = 64 / sizeof(A);
constexpr int kMergeColumns = kSplitThreads, kMergePerLane = kMergeColumns / kWarpSize;

// Sums of a warp are of so many columns at a time.
template <typename T>
constexpr int kSplitColumns = kWarpSize * Pack<T>::kSize;

template <typename T, int kRows>
struct SplitMemory {
  using A = Accumulator<T>;
  A weights[kRows][kSplitKeys];  // the products q . k, then exp(score - max)
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

// Whether no row ends within a pack, and all packs are aligned.
template <typename T, template <typename> class Matrix>
__device__ __forceinline__ bool is_whole(const Matrix<T>& matrix) {
  return matrix.is_aligned() && matrix.columns % Pack<T>::kSize == 0;
}

// One pack of row `row` from column `column` on, which may lie behind the last; zeros if the row
// does not exist. (load_tile has the same in its own words: by a call of this the other kernels
// would spill.)
template <bool kWhole, typename T, template <typename> class Matrix>
__device__ __forceinline__ Pack<T> load_part(const Matrix<T>& matrix, int32_t row, int32_t column,
                                             bool exists) {
  const int32_t inside = exists ? matrix.columns - column : 0;
  const T* source = matrix.row(row) + column;
  return kWhole ? load_pack_if(inside > 0, source) : load_pack_partly(source, inside);
}

// The same of the rows first, first + step, ..., as far as they lie before `end`.
template <bool kWhole, typename T, template <typename> class Matrix>
__device__ __forceinline__ void load_ahead(const Matrix<T>& matrix, int32_t first, int32_t step,
                                           int32_t end, int32_t column,
                                           Pack<T> (&packs)[kSplitAhead]) {
#pragma unroll
  for (int a = 0; a < kSplitAhead; ++a) {
    const int32_t row = first + a * step;
    packs[a] = load_part<kWhole>(matrix, row, column, row < end);
  }
}

// memory.weights[r][j] = the product of query row first_row + r and key keys.begin + j.
template <bool kWhole, int kRows, typename T, template <typename> class Matrix>
__device__ __forceinline__ void split_products(const AttentionForwardParams& p,
                                               const SplitPlace& place, const Matrix<T>& k,
                                               SplitMemory<T, kRows>& memory) {
  using A = Accumulator<T>;
  constexpr int kSize = Pack<T>::kSize;
  const int lanes = lanes_of_row<T>(k.columns), lane = threadIdx.x % lanes;
  const int32_t step = kSplitThreads / lanes, own = static_cast<int32_t>(threadIdx.x) / lanes;
  const int32_t count = place.keys.end - place.keys.begin;
  // Once but for the widest heads.
  for (int32_t column = lane * kSize; column - lane * kSize < k.columns; column += lanes * kSize) {
    A q[kRows][kSize];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const GroupRow row = group_row(p, place, r);
      const auto of_head = query_matrix<T>(p.q, p.q_strides, place.sequence, row.head, p.head_dim);
      const Pack<T> pack = is_whole(of_head)
                               ? load_part<true>(of_head, row.query, column, row.exists)
                               : load_part<false>(of_head, row.query, column, row.exists);
#pragma unroll
      for (int e = 0; e < kSize; ++e) q[r][e] = load(pack.element[e]);
    }
    // All lanes of a warp go round as often, for the sums below are theirs together.
    for (int32_t first = 0; first < count; first += kSplitAhead * step) {
      Pack<T> packs[kSplitAhead];
      load_ahead<kWhole>(k, place.keys.begin + first + own, step, place.keys.end, column, packs);
      A sums[kSplitAhead][kRows] = {};
#pragma unroll
      for (int a = 0; a < kSplitAhead; ++a) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A element = load(packs[a].element[e]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) sums[a][r] += q[r][e] * element;
        }
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int a = 0; a < kSplitAhead; ++a) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            sums[a][r] += __shfl_xor_sync(kFullWarp, sums[a][r], offset);
          }
        }
      }
#pragma unroll
      for (int a = 0; a < kSplitAhead; ++a) {
        const int32_t j = first + own + a * step;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (j >= count || lane != r % lanes) continue;
          A& product = memory.weights[r][j];
          product = column == lane * kSize ? sums[a][r] : product + sums[a][r];
        }
      }
    }
  }
}

// Turns the products of a row into weights, by one warp. Leaves the largest score and the weights'
// sum in `partial`.
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
    score[i] = j < count && row.exists
                   ? final_score(p, place.sequence, place.band, row.head, row.query,
                                 place.keys.begin + j, memory.weights[r][j])
                         .value
                   : kHiddenScore<A>;
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
template <bool kWhole, int kRows, typename T, template <typename> class Matrix>
__device__ __forceinline__ void split_values(const SplitPlace& place, const Matrix<T>& v,
                                             SplitMemory<T, kRows>& memory,
                                             Accumulator<T>* partials) {
  using A = Accumulator<T>;
  constexpr int kSize = Pack<T>::kSize, kColumns = kSplitColumns<T>;
  const int32_t count = place.keys.end - place.keys.begin;
  for (int32_t first = 0; first < v.columns; first += kColumns) {
    const int32_t columns = min(kColumns, v.columns - first);
    const int lanes = lanes_of_row<T>(columns), lane = threadIdx.x % lanes;
    const int32_t step = kSplitThreads / lanes;
    A sums[kRows][kSize] = {};
    for (int32_t j = threadIdx.x / lanes; j < count; j += kSplitAhead * step) {
      Pack<T> packs[kSplitAhead];
      load_ahead<kWhole>(v, place.keys.begin + j, step, place.keys.end, first + lane * kSize,
                         packs);
#pragma unroll
      for (int a = 0; a < kSplitAhead; ++a) {
        // Behind the last key are weights of 0, as far as there are any.
        const int32_t key = min(j + a * step, kSplitKeys - 1);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const A weight = memory.weights[r][key];
#pragma unroll
          for (int e = 0; e < kSize; ++e) sums[r][e] += weight * load(packs[a].element[e]);
        }
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

  if (is_whole(k)) {
    split_products<true>(p, place, k, memory);
  } else {
    split_products<false>(p, place, k, memory);
  }
  __syncthreads();
  A* const partials =
      partial_of<A>(p, sequence, place.head_kv, place.keys.begin / kSplitKeys, place.first_row);
  const int warp = threadIdx.x / kWarpSize;
  if (warp < kRows) {
    split_softmax(p, place, warp, memory, partials + int64_t{warp} * (p.head_dim_v + 2));
  }
  __syncthreads();
  if (is_whole(v)) {
    split_values<true>(place, v, memory, partials);
  } else {
    split_values<false>(place, v, memory, partials);
  }
}

// Of each warp.
template <typename A>
struct MergeMemory {
  A max[kSplitWarps], sum[kSplitWarps];
  A results[kSplitWarps][kMergeColumns];
};

// One block for each row of each query head that a sequence may have. Its warps share the chunks.
template <typename T>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    attention_split_merge_kernel(const AttentionForwardParams p) {
  using A = Accumulator<T>;
  auto& memory = *shared_memory<MergeMemory<A>>();
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

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  A max = kHiddenScore<A>, sum = 0;
  for (int32_t split = begin + static_cast<int32_t>(threadIdx.x); split < end;
       split += kSplitThreads) {
    max = max_or_nan(max, stats[split * stride]);
  }
  max = warp_max(max);
  if (lane == 0) memory.max[warp] = max;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kSplitWarps; ++w) max = max_or_nan(max, memory.max[w]);
  const A shift = max == kHiddenScore<A> ? A(0) : max;
  const auto factor_of = [&](int32_t split) { return exp(stats[split * stride] - shift); };
  for (int32_t split = begin + static_cast<int32_t>(threadIdx.x); split < end;
       split += kSplitThreads) {
    sum += factor_of(split) * stats[split * stride + 1];
  }
  sum = warp_sum(sum);
  if (lane == 0) memory.sum[warp] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int w = 0; w < kSplitWarps; ++w) sum += memory.sum[w];
  const RowEnd<A> row_end = end_row(p, head, max, sum);
  if (threadIdx.x == 0) store_row_end(p, row_of_all(p, sequence, head, row), row_end);

  T* out =
      query_rows(static_cast<T*>(p.out), p.out_strides, sequence, head) + row * p.out_strides.row;
  constexpr int kChunks = kMergeChunks<A>;
  for (int32_t column = 0; column < p.head_dim_v; column += kMergeColumns) {
    A result[kMergePerLane] = {};
    for (int32_t first = begin + warp * kChunks; first < end; first += kSplitWarps * kChunks) {
      const int32_t count = min(kChunks, end - first);
      const A own_factor = lane < count ? factor_of(first + lane) : A(0);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const A factor = __shfl_sync(kFullWarp, own_factor, i);
        const A* of_chunk = partials + (first + i) * stride + column;
#pragma unroll
        for (int c = 0; c < kMergePerLane; ++c) {
          const int32_t d = c * kWarpSize + lane;
          const bool exists = i < count && column + d < p.head_dim_v;
          result[c] += factor * (exists ? of_chunk[d] : A(0));
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kMergePerLane; ++c) memory.results[warp][c * kWarpSize + lane] = result[c];
    __syncthreads();
    const int32_t d = static_cast<int32_t>(threadIdx.x);
    if (column + d < p.head_dim_v) {
      A total = 0;
#pragma unroll
      for (int w = 0; w < kSplitWarps; ++w) total += memory.results[w][d];
      out[column + d] = store<T>(total * row_end.scale);
    }
    __syncthreads();  // the next columns' results go where these were
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
                dim3(kSplitThreads), sizeof(MergeMemory<Accumulator<T>>), stream, p);
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
