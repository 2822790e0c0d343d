// One element of the score matrix, the same on every backend: what becomes of q . k, how a row's
// softmax ends, and dropout.
#pragma once

#include <cmath>

#include "attention/attention_sequence.h"
#include "common/philox.h"

namespace fused {

template <typename A>
constexpr A kHiddenScore = -static_cast<A>(__builtin_huge_val());

// A score, and its derivative by scale * q . k.
template <typename A>
struct Score {
  A value, slope;
};

template <typename A>
FUSED_HOST_DEVICE Score<A> softcapped(A softcap, A tanh_of_ratio) {
  return {softcap * tanh_of_ratio, 1 - tanh_of_ratio * tanh_of_ratio};
}

// f(0 of the type that a mask is read as); a boolean one's elements are the bytes that they are.
template <typename F>
FUSED_HOST_DEVICE auto visit_mask(const AttentionMask& mask, const F& f) {
  if (mask.kind == MaskKind::kBool) return f(uint8_t{});
  switch (mask.dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat32:
      break;
  }
  return f(float{});
}

FUSED_HOST_DEVICE int64_t mask_offset(const AttentionMask& mask, const Sequence& sequence,
                                      int32_t head, int32_t row, int32_t column) {
  return sequence.index * mask.batch_stride + head * mask.head_stride + row * mask.row_stride +
         column * mask.column_stride;
}

// A score under an element of a mask. A hidden one is hidden even if it is NaN.
template <typename A, typename M>
FUSED_HOST_DEVICE A masked(A score, M element) {
  if constexpr (std::is_same_v<M, uint8_t>) {
    return element != 0 ? score : kHiddenScore<A>;
  } else {
    return score + static_cast<A>(load(element));
  }
}

// Whether a score is scale * q . k wherever a row sees a key.
FUSED_HOST_DEVICE bool has_no_score_options(const AttentionProblem& problem) {
  return problem.softcap.in_double == 0 && problem.maybe_alibi_slopes == nullptr &&
         problem.mask.kind == MaskKind::kNone;
}

// The score of an element inside the matrix, given q . k; -inf where it is hidden.
template <typename A>
FUSED_HOST_DEVICE Score<A> final_score(const AttentionProblem& problem, const Sequence& sequence,
                                       const Band& band, int32_t head, int32_t row, int32_t column,
                                       A dot) {
  if (!is_visible(band, row, column)) return {kHiddenScore<A>, A(0)};
  Score<A> score{dot * problem.scale.as<A>(), A(1)};
  const A softcap = problem.softcap.as<A>();
  if (softcap != 0) {
    score = softcapped(softcap, std::tanh(score.value / softcap));
  }
  if (problem.maybe_alibi_slopes != nullptr) {
    score.value -= static_cast<const A*>(problem.maybe_alibi_slopes)[head] *
                   static_cast<A>(alibi_distance(sequence, row, column));
  }
  const AttentionMask& mask = problem.mask;
  if (mask.kind == MaskKind::kNone) return score;
  if (row >= mask.rows || column >= mask.columns) return {kHiddenScore<A>, A(0)};
  const int64_t offset = mask_offset(mask, sequence, head, row, column);
  score.value = visit_mask(mask, [&](auto zero) {
    return masked(score.value, static_cast<const decltype(zero)*>(mask.data)[offset]);
  });
  return score;
}

// A row's largest score and 1 / sum(exp(score - largest)): its p is exp(s - max) * inverse_sum.
template <typename A>
struct RowStats {
  A max, inverse_sum;
};

// How the softmax of a row ends, given the largest of its keys' scores and the sum of
// exp(score - max): its stats, its log-sum-exp, and what its sum of exp(score - max) * v is to be
// multiplied by.
template <typename A>
struct RowEnd {
  RowStats<A> stats;
  A lse, scale;
};

template <typename A>
FUSED_HOST_DEVICE RowEnd<A> end_row(const AttentionProblem& problem, int32_t head, A max, A sum) {
  if (sum == 0) return {{A(0), A(0)}, kHiddenScore<A>, A(0)};  // no key
  A factor = 1;
  if (problem.maybe_sink != nullptr) {
    const A sink = static_cast<const A*>(problem.maybe_sink)[head];
    const A keys_max = max;
    max = sink > max ? sink : max;
    factor = std::exp(keys_max - max);
    sum = sum * factor + std::exp(sink - max);
  }
  return {{max, 1 / sum}, max + std::log(sum), factor / sum};
}

// Where the stats of a row lie in the [2, B, H, S] that hold them.
template <typename A>
FUSED_HOST_DEVICE RowStats<A> load_row_stats(const AttentionProblem& problem, const void* row_stats,
                                             int64_t index) {
  const int64_t rows = static_cast<int64_t>(problem.batch) * problem.num_heads * problem.seqlen_q;
  const A* stats = static_cast<const A*>(row_stats);
  return {stats[index], stats[rows + index]};
}

template <typename A>
FUSED_HOST_DEVICE void store_row_end(const AttentionForwardParams& params, int64_t index,
                                     const RowEnd<A>& end) {
  const int64_t rows = static_cast<int64_t>(params.batch) * params.num_heads * params.seqlen_q;
  A* stats = static_cast<A*>(params.row_stats);
  stats[index] = end.stats.max;
  stats[rows + index] = end.stats.inverse_sum;
  static_cast<A*>(params.lse)[index] = end.lse;
}

// The sink's share of a row's weights.
template <typename A>
FUSED_HOST_DEVICE A sink_weight(A sink, const RowStats<A>& stats) {
  return std::exp(sink - stats.max) * stats.inverse_sum;
}

// What one row gives to the gradient of its head's sink; nothing where it saw no key.
template <typename A>
FUSED_HOST_DEVICE A sink_gradient(A sink, const RowStats<A>& stats, A delta) {
  return stats.inverse_sum == 0 ? A(0) : -sink_weight(sink, stats) * delta;
}

// The weighted mean of the tangents of a row's scores so far, in two parts, of which `rest` is what
// `mean` has no digits for. A row's sums for the tangent of its output count tangents from `mean`:
// as far as they are alike they leave the output as it is, and would only cost digits.
template <typename A>
struct TangentMean {
  A mean, rest;
};

// How far the mean moves for a tile of keys, given the tile's sum of weight * (tangent - mean) and
// the row's sum of weights, with the tile.
template <typename A>
FUSED_HOST_DEVICE A mean_move(A mean, A of_tile, A sum) {
  return sum == 0 ? A(0) : (mean + of_tile / sum) - mean;
}

// What is left then, given the row's sum of weights before the tile, and the tile's sum of weight *
// (tangent - mean), counted from the new mean.
template <typename A>
FUSED_HOST_DEVICE A mean_rest(A rest, A move, A before, A of_tile, A sum) {
  return sum == 0 ? A(0) : ((rest - move) * before + of_tile) / sum;
}

// The tangent of a row's log-sum-exp less `mean`, given the mean over all keys: the sink is not
// among those.
template <typename A>
FUSED_HOST_DEVICE A beyond_mean(const AttentionTangentParams& params, int32_t head,
                                const RowStats<A>& stats, const TangentMean<A>& of_keys) {
  if (params.maybe_sink == nullptr || stats.inverse_sum == 0) return of_keys.rest;
  const A* tangents = static_cast<const A*>(params.tangents.maybe_sink);
  const A to_sink = (tangents != nullptr ? tangents[head] : A(0)) - of_keys.mean - of_keys.rest;
  return of_keys.rest +
         sink_weight(static_cast<const A*>(params.maybe_sink)[head], stats) * to_sink;
}

// What a row's distances are counted from for its slope's gradient, -sum_j distance * ds: a small
// difference where all of its keys are far. Without a sink sum_j ds is just grad_lse, so that
// -sum_j (distance - nearest) * ds - nearest * grad_lse says the same with fewer digits lost. Where
// a sink takes part, nothing is known and the count begins at 0.
FUSED_HOST_DEVICE int32_t nearest_distance(const AttentionProblem& problem,
                                           const Sequence& sequence, const Band& band,
                                           int32_t row) {
  if (problem.maybe_sink != nullptr) return 0;
  const Range keys = keys_seen_by(sequence, band, row, row);
  const int32_t middle = row + sequence.seqlen_k - sequence.seqlen_q;
  const int32_t last = middle < keys.end ? middle : keys.end - 1;
  return alibi_distance(sequence, row, last < keys.begin ? keys.begin : last);
}

// The second part; nothing for a row without keys.
template <typename A>
FUSED_HOST_DEVICE A nearest_alibi_gradient(const AttentionBackwardParams& params,
                                           const Sequence& sequence, const Band& band, int32_t row,
                                           int64_t index) {
  if (params.maybe_grad_lse == nullptr) return A(0);
  if (load_row_stats<A>(params, params.row_stats, index).inverse_sum == 0) return A(0);
  return -static_cast<A>(nearest_distance(params, sequence, band, row)) *
         static_cast<const A*>(params.maybe_grad_lse)[index];
}

// What one row of a head gives to the gradients of the head's ALiBi slope and sink.
struct HeadGradients {
  double alibi, sink;
};

template <typename A>
FUSED_HOST_DEVICE HeadGradients head_gradients(const AttentionBackwardParams& p,
                                               const Sequence& sequence, const Band& band,
                                               int32_t head, int32_t row) {
  const int64_t index = row_of_all(p, sequence, head, row);
  HeadGradients gradients{0, 0};
  if (p.maybe_row_alibi != nullptr) {
    gradients.alibi = static_cast<double>(static_cast<const A*>(p.maybe_row_alibi)[index]) +
                      nearest_alibi_gradient<A>(p, sequence, band, row, index);
  }
  if (p.maybe_grad_sink != nullptr) {
    gradients.sink = sink_gradient(static_cast<const A*>(p.maybe_sink)[head],
                                   load_row_stats<A>(p, p.row_stats, index),
                                   static_cast<const A*>(p.delta)[index]);
  }
  return gradients;
}

// Which of the four columns from column / 4 * 4 on dropout takes in a row of p, bit j for the jth:
// a pure function of their place and of (seed, offset), the bits of one Philox call.
FUSED_HOST_DEVICE uint32_t dropped_columns(const AttentionProblem& problem,
                                           const Sequence& sequence, int32_t head, int32_t row,
                                           int32_t column) {
  const uint64_t seed = static_cast<uint64_t>(problem.maybe_rng[0]);
  const uint64_t offset = static_cast<uint64_t>(problem.maybe_rng[1]);
  const uint32_t head_of_batch =
      static_cast<uint32_t>(sequence.index) * static_cast<uint32_t>(problem.num_heads) +
      static_cast<uint32_t>(head);
  const uint64_t key = seed ^ (offset & 0xffffffff00000000ull);
  const Philox4 random =
      philox4x32_10(key, Philox4{static_cast<uint32_t>(column) / 4, static_cast<uint32_t>(row),
                                 head_of_batch, static_cast<uint32_t>(offset)});
  const auto dropped = [&](uint32_t bits) -> uint32_t { return bits < problem.drop_threshold; };
  return dropped(random.x) | dropped(random.y) << 1 | dropped(random.z) << 2 |
         dropped(random.w) << 3;
}

// What dropout multiplies element (sequence, head, row, column) of p by.
template <typename A>
FUSED_HOST_DEVICE A dropout_scale(const AttentionProblem& problem, const Sequence& sequence,
                                  int32_t head, int32_t row, int32_t column) {
  const uint32_t dropped = dropped_columns(problem, sequence, head, row, column);
  return dropped >> column % 4 & 1 ? A(0) : problem.keep_scale.as<A>();
}

}  // namespace fused
