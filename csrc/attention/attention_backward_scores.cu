// The gradients that attention's scores themselves have, deterministic like the others:
//
//   grad_mask = ds, summed over the dimensions along which the mask is broadcast
//   grad_alibi_slopes[h] = -sum |i + T - S - j| * ds[i, j]
//   grad_sink[h] = -sum p[i, sink] * delta[i]
//
// with ds and delta as in attention_backward.cu. A block of the first kernel owns one tile of kOwn
// queries by kOther keys of the gradient, or, along a broadcast dimension, all of its tiles, which
// it adds up in registers: thread t has the rows 4 * (t / 16) .. + 3 and the columns t % 16 and
// t % 16 + 16, as in pair_products. Where that is much for few blocks, each takes a part of it
// (attention_score_parts.h), and the second kernel adds up the parts. Of the slopes' gradient the
// first kernel gives what is each row's, and the third, one block for each head, adds up the rows.
//
// A row's part of the slopes' gradient is a small sum of large terms: what is known of the sum of
// ds alone says by how much the row's delta was rounded, and takes that out of it (alibi_of_row).
#include "attention/attention_backward.cuh"
#include "attention/attention_mma.h"
#include "attention/attention_score_parts.h"

namespace fused {
namespace {

static_assert(kScoreRows == kOwn && kScoreKeys == kOther, "a block's tile of scores");

__device__ __forceinline__ int32_t take_place(int32_t extent, unsigned& index) {
  const int32_t place = static_cast<int32_t>(index % static_cast<unsigned>(extent));
  index /= static_cast<unsigned>(extent);
  return place;
}

// What a block has of `extent` tiles or sequences: one of them, or, to sum over, a part: each
// `parts`-th.
__device__ __forceinline__ Range take_share(int64_t stride, int32_t extent, int32_t parts,
                                            unsigned& tile, unsigned& part) {
  if (stride == 0) return {take_place(parts, part), extent};
  const int32_t place = take_place(extent, tile);
  return {place, place + 1};
}

// What a block adds up, as far as the sequences have it, in the steps of ScoreParts.
struct Shares {
  Range key_tiles, row_tiles, heads, sequences;
};

// Part blockIdx.y of tile blockIdx.x of a mask's gradient.
__device__ __forceinline__ Shares mask_shares(const AttentionBackwardParams& p,
                                              const ScoreParts& parts) {
  const ScoreGradient& gradient = p.maybe_grad_mask;
  unsigned tile = blockIdx.x, part = blockIdx.y;
  Shares shares;
  shares.key_tiles = take_share(gradient.column_stride, num_tiles(p.mask.columns, kOther),
                                parts.key_tiles, tile, part);
  shares.row_tiles =
      take_share(gradient.row_stride, num_tiles(p.mask.rows, kOwn), parts.row_tiles, tile, part);
  shares.heads = take_share(gradient.head_stride, p.num_heads, 1, tile, part);
  shares.sequences =
      take_share(gradient.batch_stride, p.num_sequences, parts.sequences, tile, part);
  return shares;
}

// One tile of a sequence's rows, with all of its keys.
__device__ __forceinline__ Shares row_shares(const AttentionProblem& p) {
  const BlockPlace place = block_place(p, true, 1);
  const int32_t tile = place.own_row / kOwn, index = place.sequence.index;
  return {{0, INT32_MAX}, {tile, tile + 1}, {place.head, place.head + 1}, {index, index + 1}};
}

// Writes the tile whose sums lie in tiles.weights, summed over what the gradient does not have.
template <typename A>
__device__ __forceinline__ void store_sums(const ScoreGradient& gradient, AttentionTiles<A>& tiles,
                                           A* target, int32_t rows, int32_t columns) {
  if (gradient.row_stride == 0) {
    if (threadIdx.x < kOther) {
      A sum = 0;
      for (int r = 0; r < kOwn; ++r) sum += tiles.weights[r][threadIdx.x];
      tiles.weights[0][threadIdx.x] = sum;
    }
    rows = 1;
    __syncthreads();
  }
  if (gradient.column_stride == 0) {
    if (threadIdx.x < kOwn) {
      A sum = 0;
      for (int c = 0; c < kOther; ++c) sum += tiles.weights[threadIdx.x][c];
      tiles.weights[threadIdx.x][0] = sum;
    }
    columns = 1;
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kOwn * kOther; i += kAttentionThreads) {
    const int r = i / kOther, c = i % kOther;
    if (r < rows && c < columns) {
      target[r * gradient.row_stride + c * gradient.column_stride] = tiles.weights[r][c];
    }
  }
}

// What a row adds up for its slope's gradient, with distances counted from the row's nearest.
template <typename A>
struct DistanceSums {
  A gradient, moment, lever;  // of ds, distance * ds and distance * p
};

// A row's -sum_j distance * ds. An error in its delta is in every ds, p times as large; so it is in
// their sum, which with the sink's own ds should be grad_lse.
template <typename A>
__device__ __forceinline__ A alibi_of_row(const AttentionBackwardParams& p, int32_t head,
                                          int64_t index, const DistanceSums<A>& sums) {
  const RowStats<A> stats = load_row_stats<A>(p, p.row_stats, index);
  if (stats.inverse_sum == 0) return A(0);
  A expected = 0;
  if (p.maybe_grad_lse != nullptr) expected = static_cast<const A*>(p.maybe_grad_lse)[index];
  if (p.maybe_sink != nullptr) {
    expected -= sink_gradient(static_cast<const A*>(p.maybe_sink)[head], stats,
                              static_cast<const A*>(p.delta)[index]);
  }
  return (sums.gradient - expected) * sums.lever - sums.moment;
}

template <typename T, bool kByDistance>
__global__ void __launch_bounds__(kAttentionThreads, sizeof(Accumulator<T>) == 8 ? 1 : 2)
    attention_backward_scores_kernel(const AttentionBackwardParams p, const ScoreParts parts) {
  using A = Accumulator<T>;
  const ScoreGradient& gradient = p.maybe_grad_mask;
  AttentionTiles<A>& tiles = *shared_memory<AttentionTiles<A>>();
  const int thread_row = threadIdx.x / 16 * kRowsPerThread, thread_column = threadIdx.x % 16;
  const Shares shares = kByDistance ? row_shares(p) : mask_shares(p, parts);

  A sums[kRowsPerThread][kColumnsPerThread] = {};
  DistanceSums<A> of_row[kRowsPerThread] = {};
  for (int32_t index = shares.sequences.begin; index < shares.sequences.end;
       index += parts.sequences) {
    const Sequence sequence = sequence_of(p, index);
    const Band band = visible_band(p, sequence);
    const int32_t row_end = min(shares.row_tiles.end, num_tiles(sequence.seqlen_q, kOwn));
    const int32_t key_end = min(shares.key_tiles.end, num_tiles(sequence.seqlen_k, kOther));
    for (int32_t head = shares.heads.begin; head < shares.heads.end; ++head) {
      const int32_t head_kv = key_head(p, head);
      const auto q = query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim);
      const auto k = key_matrix<T>(p.k, p.k_strides, sequence, head_kv, p.head_dim);
      const auto v = key_matrix<T>(p.v, p.v_strides, sequence, head_kv, p.head_dim_v);
      const auto grad_out =
          query_matrix<T>(p.grad_out, p.grad_out_strides, sequence, head, p.head_dim_v);
      for (int32_t row_tile = shares.row_tiles.begin; row_tile < row_end;
           row_tile += parts.row_tiles) {
        const int32_t first_row = row_tile * kOwn;
        const Range keys =
            keys_seen_by(sequence, band, first_row, min(first_row + kOwn, sequence.seqlen_q) - 1);
        for (int32_t key_tile = shares.key_tiles.begin; key_tile < key_end;
             key_tile += parts.key_tiles) {
          const int32_t first_key = key_tile * kOther;
          if (first_key >= keys.end || first_key + kOther <= keys.begin) continue;
          A scores[kRowsPerThread][kColumnsPerThread], dots[kRowsPerThread][kColumnsPerThread];
          pair_products(tiles, q, first_row, k, first_key, scores);
          pair_products(tiles, grad_out, first_row, v, first_key, dots);
#pragma unroll
          for (int r = 0; r < kRowsPerThread; ++r) {
            const int32_t row = first_row + thread_row + r;
            const int32_t nearest = kByDistance ? nearest_distance(p, sequence, band, row) : 0;
#pragma unroll
            for (int c = 0; c < kColumnsPerThread; ++c) {
              const int32_t column = first_key + thread_column + 16 * c;
              const ScoreWeight<A> weight =
                  score_weight(p, sequence, band, head, row, column, scores[r][c], dots[r][c]);
              if (kByDistance) {
                const A distance = static_cast<A>(alibi_distance(sequence, row, column) - nearest);
                of_row[r].gradient += weight.gradient;
                of_row[r].moment += distance * weight.gradient;
                of_row[r].lever += distance * weight.probability;
              } else {
                sums[r][c] += weight.gradient;
              }
            }
          }
        }
      }
    }
  }

  const int32_t first_row = shares.row_tiles.begin * kOwn;
  if (kByDistance) {
    const Sequence sequence = sequence_of(p, shares.sequences.begin);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const DistanceSums<A> row_sums = {warp_sum<16>(of_row[r].gradient),
                                        warp_sum<16>(of_row[r].moment),
                                        warp_sum<16>(of_row[r].lever)};
      const int32_t row = first_row + thread_row + r;
      if (thread_column != 0 || row >= sequence.seqlen_q) continue;
      const int64_t index = row_of_all(p, sequence, shares.heads.begin, row);
      static_cast<A*>(p.maybe_row_alibi)[index] =
          alibi_of_row(p, shares.heads.begin, index, row_sums);
    }
    return;
  }
  for_each_score([&](int r, int c, int i, int j) { tiles.weights[i][j] = sums[r][c]; });
  __syncthreads();
  const int32_t first_key = shares.key_tiles.begin * kOther;
  A* target = static_cast<A*>(gridDim.y > 1 ? gradient.maybe_partials : gradient.data) +
              blockIdx.y * score_gradient_size(p, gradient) +
              shares.sequences.begin * gradient.batch_stride +
              shares.heads.begin * gradient.head_stride + first_row * gradient.row_stride +
              first_key * gradient.column_stride;
  store_sums(gradient, tiles, target, p.mask.rows - first_row, p.mask.columns - first_key);
}

// Adds up the parts of a mask's gradient, a few lanes for each element: there are many elements of
// few parts, or few of many.
constexpr int kLanesPerSum = 8;

template <typename A>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_backward_parts_kernel(const ScoreGradient gradient, int64_t size, int32_t parts) {
  constexpr int kSums = kAttentionThreads / kLanesPerSum;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kSums + threadIdx.x / kLanesPerSum;
  const int32_t first = threadIdx.x % kLanesPerSum;
  CompensatedSum<A> sum;
  for (int32_t part = first; index < size && part < parts; part += kLanesPerSum) {
    sum.add(static_cast<const A*>(gradient.maybe_partials)[part * size + index]);
  }
  sum = compensated_warp_sum<kLanesPerSum>(sum);
  if (index < size && first == 0) static_cast<A*>(gradient.data)[index] = sum.total();
}

// A sum over the block in a fixed order; thread 0 has it.
__device__ __forceinline__ double block_sum(CompensatedSum<double> value,
                                            CompensatedSum<double>* of_warps) {
  value = compensated_warp_sum(value);
  __syncthreads();  // of_warps may still be read for the sum before
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  CompensatedSum<double> sum;
  for (int w = 0; w < kAttentionThreads / kWarpSize; ++w) sum.add(of_warps[w]);
  return sum.total();
}

// One block for each head. Its rows' shares may nearly cancel. Asked for three blocks at a time
// ptxas gives each what it needs; not asked, it spills for sm_100 and sm_120.
template <typename A>
__global__ void __launch_bounds__(kAttentionThreads, 3)
    attention_backward_heads_kernel(const AttentionBackwardParams p) {
  auto* of_warps = shared_memory<CompensatedSum<double>>();
  const int32_t head = static_cast<int32_t>(blockIdx.x);
  CompensatedSum<double> alibi, sink;
  for (int32_t index = 0; index < p.num_sequences; ++index) {
    const Sequence sequence = sequence_of(p, index);
    const Band band = visible_band(p, sequence);
    for (int32_t row = threadIdx.x; row < sequence.seqlen_q; row += kAttentionThreads) {
      const HeadGradients of_row = head_gradients<A>(p, sequence, band, head, row);
      alibi.add(of_row.alibi);
      sink.add(of_row.sink);
    }
  }
  const HeadGradients sum{block_sum(alibi, of_warps), block_sum(sink, of_warps)};
  if (threadIdx.x != 0) return;
  if (p.maybe_row_alibi != nullptr) {
    static_cast<A*>(p.maybe_grad_alibi_slopes)[head] = static_cast<A>(sum.alibi);
  }
  if (p.maybe_grad_sink != nullptr) {
    static_cast<A*>(p.maybe_grad_sink)[head] = static_cast<A>(sum.sink);
  }
}

template <typename T, bool kByDistance>
Status launch_scores(const AttentionBackwardParams& p, int64_t blocks, const ScoreParts& parts,
                     Stream stream) {
  if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
  return launch(attention_backward_scores_kernel<T, kByDistance>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts.total())),
                dim3(kAttentionThreads), sizeof(AttentionTiles<Accumulator<T>>), stream, p, parts);
}

template <typename T>
Status launch_mask_gradient(const AttentionBackwardParams& p, Stream stream) {
  using A = Accumulator<T>;
  constexpr int kSums = kAttentionThreads / kLanesPerSum;
  const ScoreGradient& gradient = p.maybe_grad_mask;
  const ScoreParts parts = score_parts(p, gradient);
  const int64_t tiles = (gradient.batch_stride ? int64_t{p.num_sequences} : 1) *
                        (gradient.head_stride ? p.num_heads : 1) *
                        (gradient.row_stride ? num_tiles(p.mask.rows, kOwn) : 1) *
                        (gradient.column_stride ? num_tiles(p.mask.columns, kOther) : 1);
  const Status status = launch_scores<T, false>(p, tiles, parts, stream);
  if (status != nullptr || parts.total() == 1) return status;
  const int64_t size = score_gradient_size(p, gradient), blocks = (size + kSums - 1) / kSums;
  if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
  return launch(attention_backward_parts_kernel<A>, dim3(static_cast<unsigned>(blocks)),
                dim3(kAttentionThreads), 0, stream, gradient, size, parts.total());
}

template <typename T>
Status launch_all_scores(const AttentionBackwardParams& p, Stream stream) {
  Status status = nullptr;
  if (p.maybe_grad_mask.data != nullptr) status = launch_mask_gradient<T>(p, stream);
  if (status == nullptr && p.maybe_row_alibi != nullptr) {
    status = launch_scores<T, true>(p, num_blocks(p, true, 1), {}, stream);
  }
  if (status != nullptr) return status;
  if (p.maybe_grad_alibi_slopes == nullptr && p.maybe_grad_sink == nullptr) return nullptr;
  return launch(attention_backward_heads_kernel<Accumulator<T>>,
                dim3(static_cast<unsigned>(p.num_heads)), dim3(kAttentionThreads),
                kAttentionThreads / kWarpSize * sizeof(CompensatedSum<double>), stream, p);
}

}  // namespace

Status attention_backward_scores_cuda(const AttentionBackwardParams& params, Stream stream) {
  if (params.dtype == DType::kFloat32 && attention_mma_supported(params)) {
    return launch_all_scores<Tf32>(params, stream);
  }
  return visit_dtype(params.dtype, [&](auto element) {
    return launch_all_scores<decltype(element)>(params, stream);
  });
}

}  // namespace fused
