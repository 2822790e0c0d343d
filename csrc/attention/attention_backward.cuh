// What the kernels of the attention's backward pass share.
#pragma once

#include "attention/attention_score.h"
#include "attention/attention_tile.cuh"

namespace fused {

// A float as products in tf32 take it: ptx::round_to_tf32, which sm_75 lacks. What is subtracted
// from such products or divides them has to be made of the same factors: with one key to a row,
// delta is the product, and its error too.
struct Tf32 {
  float value;
};

__device__ __forceinline__ float load(Tf32 x) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x.value);
  return x.value == x.value ? detail::bit_cast<float>((bits + 0x1000u) & 0xffffe000u) : x.value;
}

// The gradients that the scores themselves have: of the mask, of ALiBi slopes, of the sink.
Status attention_backward_scores_cuda(const AttentionBackwardParams& params, Stream stream);

// What an element of the score matrix gives to the gradients.
template <typename A>
struct ScoreWeight {
  A kept;         // keep * p, which weighs grad_out for grad_v
  A gradient;     // ds, the derivative of the loss by the final score
  A slope;        // the final score's derivative by scale * q . k
  A probability;  // p
};

// From an element's final score, p, keep, and ds / p, which is keep * grad_out . v less its row's
// delta.
template <typename A>
__device__ __forceinline__ ScoreWeight<A> weigh_score(const Score<A>& score, A probability, A keep,
                                                      A gradient_by_p) {
  if (score.value == kHiddenScore<A>) return {0, 0, 0, 0};
  return {keep * probability, probability * gradient_by_p, score.slope, probability};
}

// From an element's products q . k and grad_out . v. Hidden keys give zeros, not even a NaN, and so
// does an element outside the matrix.
template <typename A>
__device__ __forceinline__ ScoreWeight<A> score_weight(const AttentionBackwardParams& p,
                                                       const Sequence& sequence, const Band& band,
                                                       int32_t head, int32_t row, int32_t column,
                                                       A dot, A dot_v) {
  if (row >= sequence.seqlen_q || column >= sequence.seqlen_k) return {0, 0, 0, 0};
  const Score<A> score = final_score(p, sequence, band, head, row, column, dot);
  const int64_t index = row_of_all(p, sequence, head, row);
  const RowStats<A> stats = load_row_stats<A>(p, p.row_stats, index);
  const A probability = exp(score.value - stats.max) * stats.inverse_sum;
  const A keep = p.maybe_rng == nullptr ? A(1) : dropout_scale<A>(p, sequence, head, row, column);
  const A delta = static_cast<const A*>(p.delta)[index];
  return weigh_score(score, probability, keep, keep * dot_v - delta);
}

}  // namespace fused
