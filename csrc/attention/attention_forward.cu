// Attention forward: one pass over the keys with the online softmax of Milakov & Gimelshein
// (arXiv:1805.02867), tiled as in FlashAttention (arXiv:2205.14135, algorithm 1).
//
// A block computes kOwn rows by kWidth columns of one head's output; a head wider than kWidth costs
// its scores once more for each further block. Who holds what: attention_tile.cuh and
// attention_softmax.cuh.
#include "attention/attention_mma.h"
#include "attention/attention_softmax.cuh"
#include "attention/attention_split.h"

namespace fused {
namespace {

// Double may take one block at a time, and so may float from pages, where the compiler would rather
// spill.
template <typename T, bool kPaged>
__global__ void __launch_bounds__(kAttentionThreads, sizeof(T) >= (kPaged ? 4 : 8) ? 1 : 0)
    attention_forward_kernel(const AttentionForwardParams p) {
  using A = Accumulator<T>;
  AttentionTiles<A>& tiles = *shared_memory<AttentionTiles<A>>();
  const BlockPlace place = block_place(p, true, p.head_dim_v);
  const Sequence& sequence = place.sequence;
  if (place.own_row >= sequence.seqlen_q || is_split(p, sequence)) return;
  const int32_t head_kv = key_head(p, place.head);
  const auto q = query_matrix<T>(p.q, p.q_strides, sequence, place.head, p.head_dim);
  const auto k = cache_matrix<kPaged, T>(p, p.k, p.k_strides, sequence, head_kv, p.head_dim);
  const auto v = cache_matrix<kPaged, T>(p, p.v, p.v_strides, sequence, head_kv, p.head_dim_v);

  A result[kRowsPerThread][kValuesPerThread] = {};
  RunningSoftmax<A> running;

  const Band band = visible_band(p, sequence);
  const int32_t last_row = min(place.own_row + kOwn, sequence.seqlen_q) - 1;
  const Range keys = keys_seen_by(sequence, band, place.own_row, last_row);
  for (int32_t key_row = keys.begin; key_row < keys.end; key_row += kOther) {
    // Scores, into shared memory.
    A scores[kRowsPerThread][kColumnsPerThread];
    pair_products(tiles, q, place.own_row, k, key_row, scores);
    for_each_score([&](int r, int c, int i, int j) {
      const int32_t row = place.own_row + i, column = key_row + j;
      tiles.weights[i][j] =
          row < sequence.seqlen_q && column < sequence.seqlen_k
              ? final_score(p, sequence, band, place.head, row, column, scores[r][c]).value
              : kHiddenScore<A>;
    });

    // Weights, and what they do to the result so far.
    A rescale[kRowsPerThread];
    softmax_step(p, place, key_row, tiles, running, rescale, [](int, A, A, A) {});
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int e = 0; e < kValuesPerThread; ++e) result[r][e] *= rescale[r];
    }
    accumulate(tiles, v, key_row, place.column, result);
  }

  // Results and log-sum-exp.
  A row_scale[kRowsPerThread];
  end_rows(p, place, running, row_scale, [](int, const RowEnd<A>&, bool, int64_t) {});
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
