// Attention backward, without atomics and without a score matrix in memory: the probabilities are
// recomputed tile by tile from the saved statistics of each row, as in FlashAttention
// (arXiv:2205.14135, algorithm 4), once for the gradient of each operand, so that every sum has one
// owner and one order.
//
//   p      = exp(s - max) / sum,  dp = keep * (grad_out . v),  ds = p * (dp - delta)
//   dx     = ds * (1 - tanh(x / softcap)^2),  ds without a softcap
//   grad_q = scale * dx k,  grad_k = scale * dx^T q,  grad_v = (keep * p)^T grad_out
//   delta  = sum(grad_out * out) - grad_lse, for each row
//
// A block computes kOwn rows by kWidth columns of one head's gradient. Who holds what:
// attention_tile.cuh.
#include "attention/attention_backward.cuh"
#include "attention/attention_mma.h"

namespace fused {
namespace {

enum class Gradient { kQuery, kKey, kValue };

// One warp for each row of out. Factor is how products take T.
//
// The sum is compensated: where a row sees one key, dp is this sum in another order, and what is
// left of dp - delta would be nothing but their errors.
template <typename T, typename Factor>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_delta_kernel(const AttentionBackwardParams p) {
  using A = Accumulator<T>;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * (kAttentionThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (index >= static_cast<int64_t>(p.batch) * p.num_heads * p.seqlen_q) return;
  const int64_t row = index % p.seqlen_q, head = index / p.seqlen_q % p.num_heads,
                batch = index / p.seqlen_q / p.num_heads;
  const auto start_of_row = [&](const HeadStrides& strides) {
    return batch * strides.batch + head * strides.head + row * strides.row;
  };
  const T* out = static_cast<const T*>(p.out) + start_of_row(p.out_strides);
  const Factor* grad_out =
      static_cast<const Factor*>(p.grad_out) + start_of_row(p.grad_out_strides);
  CompensatedSum<A> of_lane;
  for (int32_t d = lane; d < p.head_dim_v; d += kWarpSize) {
    of_lane.add(load(out[d]) * load(grad_out[d]));
  }
  const A sum = compensated_warp_sum(of_lane).total();
  if (lane == 0) {
    const A* maybe_grad_lse = static_cast<const A*>(p.maybe_grad_lse);
    static_cast<A*>(p.delta)[index] = maybe_grad_lse ? sum - maybe_grad_lse[index] : sum;
  }
}

// Two blocks at a time, which share the latency of their loads; in double one, whose sums would
// spill.
template <Gradient kGradient, typename T>
__global__ void __launch_bounds__(kAttentionThreads, sizeof(Accumulator<T>) == 8 ? 1 : 2)
    attention_backward_kernel(const AttentionBackwardParams p) {
  using A = Accumulator<T>;
  constexpr bool kOwnsQueries = kGradient == Gradient::kQuery;
  AttentionTiles<A>& tiles = *shared_memory<AttentionTiles<A>>();
  const int32_t columns = kGradient == Gradient::kValue ? p.head_dim_v : p.head_dim;
  const BlockPlace place = block_place(p, kOwnsQueries, columns);
  const Sequence& sequence = place.sequence;
  const int32_t own_length = kOwnsQueries ? sequence.seqlen_q : sequence.seqlen_k;
  if (place.own_row >= own_length) return;
  const int32_t group = group_size(p);
  const int32_t head_kv = kOwnsQueries ? place.head / group : place.head;
  const auto k = key_matrix<T>(p.k, p.k_strides, sequence, head_kv, p.head_dim);
  const auto v = key_matrix<T>(p.v, p.v_strides, sequence, head_kv, p.head_dim_v);

  const Band band = visible_band(p, sequence);
  A result[kRowsPerThread][kValuesPerThread] = {};
  // A key's gradient sums over all query heads that share it.
  const int32_t head_begin = kOwnsQueries ? place.head : place.head * group;
  const int32_t head_end = kOwnsQueries ? place.head + 1 : head_begin + group;
  for (int32_t head = head_begin; head < head_end; ++head) {
    const auto q = query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim);
    const auto grad_out =
        query_matrix<T>(p.grad_out, p.grad_out_strides, sequence, head, p.head_dim_v);

    const int32_t last_own = min(place.own_row + kOwn, own_length) - 1;
    const Range others = kOwnsQueries ? keys_seen_by(sequence, band, place.own_row, last_own)
                                      : rows_seeing(sequence, band, place.own_row, last_own);
    for (int32_t other_row = others.begin; other_row < others.end; other_row += kOther) {
      A scores[kRowsPerThread][kColumnsPerThread];
      A dots[kRowsPerThread][kColumnsPerThread] = {};  // grad_v does without
      if (kOwnsQueries) {
        pair_products(tiles, q, place.own_row, k, other_row, scores);
        pair_products(tiles, grad_out, place.own_row, v, other_row, dots);
      } else {
        pair_products(tiles, k, place.own_row, q, other_row, scores);
        if (kGradient == Gradient::kKey) {
          pair_products(tiles, v, place.own_row, grad_out, other_row, dots);
        }
      }
      for_each_score([&](int r, int c, int i, int j) {
        const int32_t own = place.own_row + i, other = other_row + j;
        const int32_t row = kOwnsQueries ? own : other, column = kOwnsQueries ? other : own;
        const ScoreWeight<A> weight =
            score_weight(p, sequence, band, head, row, column, scores[r][c], dots[r][c]);
        tiles.weights[i][j] =
            kGradient == Gradient::kValue ? weight.kept : weight.gradient * weight.slope;
      });
      const auto& values = kGradient == Gradient::kQuery ? k
                           : kGradient == Gradient::kKey ? q
                                                         : grad_out;
      accumulate(tiles, values, other_row, place.column, result);
    }
  }

  A row_scale[kRowsPerThread];
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    row_scale[r] = kGradient == Gradient::kValue ? A(1) : p.scale.as<A>();
  }
  T* const data = static_cast<T*>(kGradient == Gradient::kQuery ? p.maybe_grad_q
                                  : kGradient == Gradient::kKey ? p.maybe_grad_k
                                                                : p.maybe_grad_v);
  const HeadStrides& strides = kGradient == Gradient::kQuery ? p.grad_q_strides
                               : kGradient == Gradient::kKey ? p.grad_k_strides
                                                             : p.grad_v_strides;
  T* const gradient = kOwnsQueries ? query_rows(data, strides, sequence, place.head)
                                   : key_rows(data, strides, sequence, place.head);
  store_result(gradient, strides.row, place.own_row, own_length, place.column, columns, result,
               row_scale);
}

template <Gradient kGradient, typename T>
Status launch_gradient(const AttentionBackwardParams& p, Stream stream) {
  const bool owns_queries = kGradient == Gradient::kQuery;
  const int64_t blocks =
      num_blocks(p, owns_queries, kGradient == Gradient::kValue ? p.head_dim_v : p.head_dim);
  if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
  return launch(attention_backward_kernel<kGradient, T>, dim3(static_cast<unsigned>(blocks)),
                dim3(kAttentionThreads), sizeof(AttentionTiles<Accumulator<T>>), stream, p);
}

template <typename T>
Status launch_gradients(const AttentionBackwardParams& p, Stream stream) {
  Status status = nullptr;
  if (p.maybe_grad_q != nullptr) status = launch_gradient<Gradient::kQuery, T>(p, stream);
  if (status == nullptr && p.maybe_grad_k != nullptr) {
    status = launch_gradient<Gradient::kKey, T>(p, stream);
    if (status == nullptr) status = launch_gradient<Gradient::kValue, T>(p, stream);
  }
  return status;
}

}  // namespace

Status attention_backward_cuda(const AttentionBackwardParams& params, Stream stream) {
  return visit_dtype(params.dtype, [&](auto element) -> Status {
    using T = decltype(element);
    constexpr int kRowsPerBlock = kAttentionThreads / kWarpSize;
    const int64_t rows = static_cast<int64_t>(params.batch) * params.num_heads * params.seqlen_q;
    const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
    if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
    const bool on_tensor_cores = attention_mma_supported(params);
    auto delta_kernel = attention_backward_delta_kernel<T, T>;
    if constexpr (std::is_same_v<T, float>) {
      if (on_tensor_cores) delta_kernel = attention_backward_delta_kernel<T, Tf32>;
    }
    Status status = launch(delta_kernel, dim3(static_cast<unsigned>(blocks)),
                           dim3(kAttentionThreads), 0, stream, params);
    if (status == nullptr) {
      status = on_tensor_cores ? attention_mma_backward(params, stream)
                               : launch_gradients<T>(params, stream);
    }
    return status == nullptr ? attention_backward_scores_cuda(params, stream) : status;
  });
}

}  // namespace fused
