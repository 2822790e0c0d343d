// Attention forward: one pass over the keys with the online softmax of Milakov & Gimelshein
// (arXiv:1805.02867), tiled as in FlashAttention (arXiv:2205.14135, algorithm 1).
//
// A block computes kOwn rows by kWidth columns of one head's output; a head wider than kWidth costs
// its scores once more for each further block. Who holds what: attention_tile.cuh. Lane j of a warp
// has the score of key j of the tile, for one row after another, in the softmax.
#include "attention/attention_mma.h"
#include "attention/attention_score.h"
#include "attention/attention_split.h"
#include "attention/attention_tile.cuh"

namespace fused {
namespace {

constexpr int kRowsPerWarp = kOwn / (kAttentionThreads / kWarpSize);

// The softmax so far of a warp's rows, the same in all lanes.
template <typename A>
struct RunningSoftmax {
  A max[kRowsPerWarp];  // of the scores
  A sum[kRowsPerWarp];  // of exp(score - max)
};

// Turns the scores in tiles.weights into exp(score - max) (with dropout applied) and returns in
// `rescale` what each of the thread's result rows is to be multiplied by.
template <typename A>
__device__ __forceinline__ void softmax_step(const AttentionForwardParams& p,
                                             const BlockPlace& place, int32_t key_row,
                                             AttentionTiles<A>& tiles, RunningSoftmax<A>& running,
                                             A (&rescale)[kRowsPerThread]) {
  const int warp_row = threadIdx.x / kWarpSize * kRowsPerWarp, lane = threadIdx.x % kWarpSize;
  const int first_result_row = threadIdx.x % kWarpSize / 16 * kRowsPerThread;
  const Sequence& sequence = place.sequence;
  __syncwarp();  // the scores come from all lanes
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const A score = tiles.weights[warp_row + r][lane];
    A new_max = warp_max(score);
    new_max = running.max[r] > new_max ? running.max[r] : new_max;
    // A row without a key so far has no maximum: anything finite will do, its weights are 0.
    const A shift = new_max == -INFINITY ? A(0) : new_max;
    const A factor = exp(running.max[r] - shift);
    A weight = exp(score - shift);
    running.sum[r] = running.sum[r] * factor + warp_sum(weight);
    running.max[r] = new_max;
    if (r >= first_result_row && r < first_result_row + kRowsPerThread) {
      rescale[r % kRowsPerThread] = factor;
    }
    const int32_t row = place.own_row + warp_row + r, column = key_row + lane;
    if (p.maybe_rng != nullptr && row < sequence.seqlen_q && column < sequence.seqlen_k) {
      weight *= dropout_scale<A>(p, sequence, place.head, row, column);
    }
    tiles.weights[warp_row + r][lane] = weight;
  }
}

// Double may take one block at a time, where the compiler would rather spill.
template <typename T, bool kPaged>
__global__ void __launch_bounds__(kAttentionThreads, sizeof(Accumulator<T>) == 8 ? 1 : 0)
    attention_forward_kernel(const AttentionForwardParams p) {
  using A = Accumulator<T>;
  AttentionTiles<A>& tiles = *shared_memory<AttentionTiles<A>>();
  const BlockPlace place = block_place(p, true, p.head_dim_v);
  const Sequence& sequence = place.sequence;
  if (place.own_row >= sequence.seqlen_q || is_split(p, sequence)) return;
  const int32_t head_kv = place.head / (p.num_heads / p.num_heads_kv);
  const auto q = query_matrix<T>(p.q, p.q_strides, sequence, place.head, p.head_dim);
  const auto k = cache_matrix<kPaged, T>(p, p.k, p.k_strides, sequence, head_kv, p.head_dim);
  const auto v = cache_matrix<kPaged, T>(p, p.v, p.v_strides, sequence, head_kv, p.head_dim_v);
  const int thread_row = threadIdx.x / 16 * kRowsPerThread, thread_column = threadIdx.x % 16;

  A result[kRowsPerThread][kValuesPerThread] = {};
  RunningSoftmax<A> running;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    running.max[r] = -INFINITY;
    running.sum[r] = 0;
  }

  const Band band = visible_band(p, sequence);
  const int32_t last_row = min(place.own_row + kOwn, sequence.seqlen_q) - 1;
  const Range keys = keys_seen_by(sequence, band, place.own_row, last_row);
  for (int32_t key_row = keys.begin; key_row < keys.end; key_row += kOther) {
    // Scores, into shared memory.
    A scores[kRowsPerThread][kColumnsPerThread];
    pair_products(tiles, q, place.own_row, k, key_row, scores);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const int32_t row = place.own_row + thread_row + r;
        const int32_t column = key_row + thread_column + 16 * c;
        tiles.weights[thread_row + r][thread_column + 16 * c] =
            row < sequence.seqlen_q && column < sequence.seqlen_k
                ? final_score(p, sequence, band, place.head, row, column, scores[r][c]).value
                : kHiddenScore<A>;
      }
    }

    // Weights, and what they do to the result so far.
    A rescale[kRowsPerThread];
    softmax_step(p, place, key_row, tiles, running, rescale);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int e = 0; e < kValuesPerThread; ++e) result[r][e] *= rescale[r];
    }
    accumulate(tiles, v, key_row, place.column, result);
  }

  // Results and log-sum-exp.
  const int warp_row = threadIdx.x / kWarpSize * kRowsPerWarp, lane = threadIdx.x % kWarpSize;
  const int first_result_row = lane / 16 * kRowsPerThread;
  A row_scale[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const RowEnd<A> end = end_row(p, place.head, running.max[r], running.sum[r]);
    if (r >= first_result_row && r < first_result_row + kRowsPerThread) {
      row_scale[r % kRowsPerThread] = end.scale;
    }
    const int32_t row = place.own_row + warp_row + r;
    if (lane == 0 && place.column == 0 && row < sequence.seqlen_q) {
      store_row_end(p, row_of_all(p, sequence, place.head, row), end);
    }
  }
  T* out = query_rows(static_cast<T*>(p.out), p.out_strides, sequence, place.head);
  store_result(out, p.out_strides.row, place.own_row, sequence.seqlen_q, place.column, p.head_dim_v,
               result, row_scale);
}

}  // namespace

Status attention_forward_cuda(const AttentionForwardParams& params, Stream stream) {
  if (params.maybe_partials != nullptr) {
    const Status status = attention_split_forward(params, stream);
    if (status != nullptr || params.maybe_cu_seqlens_q == nullptr) return status;
  }
  if (attention_mma_supported(params)) return attention_mma_forward(params, stream);
  const int64_t blocks = num_blocks(params, true, params.head_dim_v);
  if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
  return visit_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = params.maybe_block_table != nullptr ? attention_forward_kernel<T, true>
                                                            : attention_forward_kernel<T, false>;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kAttentionThreads),
                  sizeof(AttentionTiles<Accumulator<T>>), stream, params);
  });
}

}  // namespace fused
