// Attention and its tangent in one pass over the keys: the forward pass of attention_forward.cu
// and, with the same running softmax, the sums that the tangents of its results are made of
// (attention.h). A block has the same tiles; beside its products of the scores and of the output
// are two of the scores' tangents and two of the output's.
//
// Two blocks share a multiprocessor's registers in 16 bits; in float and double, where the compiler
// would then spill, one has them.
#include "attention/attention_softmax.cuh"

namespace fused {
namespace {

// A sequence's operands in one head, and their tangents, which may be without data.
template <typename T>
struct Operands {
  __device__ __forceinline__ Operands(const AttentionProblem& p, const BlockPlace& place) {
    const int32_t head_kv = key_head(p, place.head);
    q = query_matrix<T>(p.q, p.q_strides, place.sequence, place.head, p.head_dim);
    k = key_matrix<T>(p.k, p.k_strides, place.sequence, head_kv, p.head_dim);
    v = key_matrix<T>(p.v, p.v_strides, place.sequence, head_kv, p.head_dim_v);
  }
  HeadMatrix<T> q, k, v;
};

// Puts a tile's scores into tiles.weights and their tangents into tiles.own, which is free between
// the products. Where a score is hidden its tangent is zero.
template <typename T, typename A>
__device__ __forceinline__ void make_scores(const AttentionTangentParams& p,
                                            const BlockPlace& place, const Band& band,
                                            const Operands<T>& operands,
                                            const Operands<T>& tangents, int32_t key_row,
                                            AttentionTiles<A>& tiles) {
  const Sequence& sequence = place.sequence;
  A scores[kRowsPerThread][kColumnsPerThread], of_scores[kRowsPerThread][kColumnsPerThread] = {};
  pair_products(tiles, operands.q, place.own_row, operands.k, key_row, scores);
  if (p.tangents.q != nullptr) {
    add_pair_products(tiles, tangents.q, place.own_row, operands.k, key_row, of_scores);
  }
  if (p.tangents.k != nullptr) {
    add_pair_products(tiles, operands.q, place.own_row, tangents.k, key_row, of_scores);
  }
  __syncwarp();  // all of the warp are done with its rows of tiles.own
  for_each_score([&](int r, int c, int i, int j) {
    const int32_t row = place.own_row + i, column = key_row + j;
    Score<A> score{kHiddenScore<A>, A(0)};
    if (row < sequence.seqlen_q && column < sequence.seqlen_k) {
      score = final_score(p, sequence, band, place.head, row, column, scores[r][c]);
    }
    A tangent = 0;
    if (score.value != kHiddenScore<A>) {
      tangent = final_score(p.tangents, sequence, band, place.head, row, column,
                            score.slope * of_scores[r][c])
                    .value;
    }
    tiles.weights[i][j] = score.value;
    tiles.own[i][j] = tangent;
  });
}

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads, sizeof(T) == 2 ? 2 : 1)
    attention_tangent_kernel(const AttentionTangentParams p) {
  using A = Accumulator<T>;
  AttentionTiles<A>& tiles = *shared_memory<AttentionTiles<A>>();
  const BlockPlace place = block_place(p, true, p.head_dim_v);
  const Sequence& sequence = place.sequence;
  if (place.own_row >= sequence.seqlen_q) return;
  const Operands<T> operands(p, place), tangents(p.tangents, place);
  const int warp_row = threadIdx.x / kWarpSize * kRowsPerWarp, lane = threadIdx.x % kWarpSize;

  A out[kRowsPerThread][kValuesPerThread] = {}, out_tangent[kRowsPerThread][kValuesPerThread] = {};
  RunningSoftmax<A> running;
  TangentMean<A> mean{0, 0};  // in lane r for the warp's row r

  const Band band = visible_band(p, sequence);
  const int32_t last_row = min(place.own_row + kOwn, sequence.seqlen_q) - 1;
  const Range keys = keys_seen_by(sequence, band, place.own_row, last_row);
  for (int32_t key_row = keys.begin; key_row < keys.end; key_row += kOther) {
    make_scores(p, place, band, operands, tangents, key_row, tiles);
    A rescale[kRowsPerThread], moved[kRowsPerThread];
    softmax_step(p, place, key_row, tiles, running, rescale,
                 [&](int r, A weights_of_tile, A weight, A kept) {
                   A& tangent = tiles.own[warp_row + r][lane];
                   const A sum = running.sum[r];
                   const A old_mean = __shfl_sync(kFullWarp, mean.mean, r);
                   const A move = mean_move(old_mean, warp_sum(weight * (tangent - old_mean)), sum);
                   const A counted = tangent - (old_mean + move);
                   const A of_tile = warp_sum(weight * counted);
                   if (lane == r) {
                     const A before = sum - weights_of_tile;
                     mean = {old_mean + move, mean_rest(mean.rest, move, before, of_tile, sum)};
                   }
                   keep_result_row(lane, r, move, moved);
                   tangent = kept * counted;
                 });
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int e = 0; e < kValuesPerThread; ++e) {
        out[r][e] *= rescale[r];
        out_tangent[r][e] = out_tangent[r][e] * rescale[r] - moved[r] * out[r][e];
      }
    }
    accumulate(tiles, operands.v, key_row, place.column, out);
    accumulate_staged(tiles, tiles.own, out_tangent);
    if (p.tangents.v != nullptr) {
      __syncthreads();  // everyone is done with the values
      accumulate(tiles, tangents.v, key_row, place.column, out_tangent);
    }
  }

  A row_scale[kRowsPerThread], beyond[kRowsPerThread];
  end_rows(p, place, running, row_scale,
           [&](int r, const RowEnd<A>& end, bool writes, int64_t index) {
             const TangentMean<A> of_keys{__shfl_sync(kFullWarp, mean.mean, r),
                                          __shfl_sync(kFullWarp, mean.rest, r)};
             const A of_row = beyond_mean(p, place.head, end.stats, of_keys);
             keep_result_row(lane, r, of_row, beyond);
             if (writes) static_cast<A*>(p.lse_tangent)[index] = of_keys.mean + of_row;
           });
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
    for (int e = 0; e < kValuesPerThread; ++e) out_tangent[r][e] -= beyond[r] * out[r][e];
  }
  const auto store = [&](void* data, const HeadStrides& strides, const auto& result) {
    store_result(query_rows(static_cast<T*>(data), strides, sequence, place.head), strides.row,
                 place.own_row, sequence.seqlen_q, place.column, p.head_dim_v, result, row_scale);
  };
  store(p.out, p.out_strides, out);
  store(p.out_tangent, p.out_tangent_strides, out_tangent);
}

}  // namespace

Status attention_tangent_cuda(const AttentionTangentParams& params, Stream stream) {
  const int64_t blocks = num_blocks(params, true, params.head_dim_v);
  if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
  return visit_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    return launch(attention_tangent_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                  dim3(kAttentionThreads), sizeof(AttentionTiles<Accumulator<T>>), stream, params);
  });
}

}  // namespace fused
