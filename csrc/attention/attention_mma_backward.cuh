// Attention backward on tensor cores, without atomics: the probabilities are recomputed tile by
// tile from the saved statistics of each row, as in FlashAttention-2 (arXiv:2307.08691, algorithm
// 2), once for the queries' gradient and once for the keys' and values', so that every sum has one
// owner and one order. The formulas: attention_backward.cu.
//
// A block owns Tile::kOwn rows of queries, or of keys, of one head. For keys it computes the
// transposed scores, k q^T, and has in registers what is the left operand of both products that
// follow. Beyond head_dim 128 two gradients do not fit beside each other, and those of keys and of
// values are computed by two launches, the scores once more. Shared memory has the block's own rows
// and a ring of two tiles of the others; who holds what: attention_mma_tile.cuh.
#pragma once

#include "attention/attention_backward.cuh"
#include "attention/attention_mma_score.cuh"

namespace fused {
namespace {

enum class MmaGradient { kQuery, kKeyValue, kKey, kValue };

template <typename T, int kDim, MmaGradient kGradient, bool kOptions>
using BackwardTile =
    MmaTile<kGradient == MmaGradient::kQuery ? MmaPass::kQueryGradient : MmaPass::kKeyGradient, T,
            kOptions, kDim>;

// What a row of queries makes of a score: p = exp_below(score, max) * inverse_sum.
struct RowTerms {
  float max, inverse_sum, delta;
};

template <typename T, int kDim, MmaGradient kGradient, typename Tile>
struct BackwardMemory {
  // Own rows of q and grad_out, or of k and v; in the end the gradients.
  T own[2][Tile::kOwn * kDim];
  // Other rows of k and v, or of q and grad_out.
  T others[Tile::kStages][2][Tile::kOthers * kDim];
  // Where the others are queries.
  RowTerms terms[Tile::kStages][kGradient == MmaGradient::kQuery ? 1 : Tile::kOthers];
};

// Of a row outside the matrix: weights of 0.
__device__ __forceinline__ RowTerms load_row_terms(const AttentionBackwardParams& p,
                                                   const Sequence& sequence, int32_t head,
                                                   int32_t row) {
  if (row >= sequence.seqlen_q) return {0, 0, 0};
  const int64_t index = row_of_all(p, sequence, head, row);
  const RowStats<float> stats = load_row_stats<float>(p, p.row_stats, index);
  return {stats.max, stats.inverse_sum, static_cast<const float*>(p.delta)[index]};
}

// One block's work, and where its scores lie: own rows are queries or keys.
template <typename T, int kDim, MmaGradient kGradient, bool kOptions>
struct Gradients {
  using Tile = BackwardTile<T, kDim, kGradient, kOptions>;
  static constexpr bool kOwnsQueries = kGradient == MmaGradient::kQuery;
  static constexpr bool kOfValues =
      kGradient == MmaGradient::kValue || kGradient == MmaGradient::kKeyValue;
  static constexpr bool kOfScores = kGradient != MmaGradient::kValue;
  static constexpr int kM = Tile::kRowTiles, kN = Tile::kOthers / 8;

  const AttentionBackwardParams& p;
  const Sequence& sequence;
  const Band band;

  // Turns products into weights: `scores` to keep * p, `dots` to the derivative by scale * q . k.
  // On the way `dots` is that divided by p: the slopes of all scores would have no room beside it.
  // `whole` says that no border touches the tile. terms_of(m, half, n, i) gives the terms of an
  // element's row.
  template <typename TermsOf>
  __device__ __forceinline__ void weigh(int32_t head, int32_t first_own, int32_t first_other,
                                        bool whole, const TermsOf& terms_of,
                                        float (&scores)[kM][kN][4],
                                        float (&dots)[kM][kN][4]) const {
    const ScoreTile<kOwnsQueries> tile{p, sequence, band, head, first_own, first_other};
    const bool drops = kOptions && p.maybe_rng != nullptr;
    Dropped<kM, kN> dropped;
    if (drops) dropped.draw(tile);
    const auto keep = [&](int m, int n, int i) {
      return drops ? dropped.scale(m, n, i, p.keep_scale.in_float) : 1.0f;
    };
    for_each_element<kM, kN>([&](int m, int n, int i) {
      // Rounded as in the forward pass, not joined with the difference: the largest is the maximum.
      scores[m][n][i] = __fmul_rn(scores[m][n][i], p.scale.in_float);
      dots[m][n][i] = keep(m, n, i) * dots[m][n][i] - terms_of(m, i / 2, n, i % 2).delta;
    });
    if (kOptions) {
      tile.apply_options(scores, [&](int m, int n, int i, float slope) { dots[m][n][i] *= slope; });
    }
    if (!whole) tile.hide_outside(scores);
    for_each_element<kM, kN>([&](int m, int n, int i) {
      const RowTerms terms = terms_of(m, i / 2, n, i % 2);
      const float probability = exp_below(scores[m][n][i], terms.max) * terms.inverse_sum;
      const auto weight = weigh_score(Score<float>{scores[m][n][i], 1.0f}, probability,
                                      keep(m, n, i), dots[m][n][i]);
      scores[m][n][i] = weight.kept;
      dots[m][n][i] = weight.gradient;
    });
  }
};

template <typename T, int kDim, MmaGradient kGradient, bool kOptions>
__device__ __forceinline__ void compute_gradients(const AttentionBackwardParams& p) {
  using Block = Gradients<T, kDim, kGradient, kOptions>;
  using Tile = typename Block::Tile;
  constexpr int kM = Block::kM, kN = Block::kN;
  constexpr bool kOwnsQueries = Block::kOwnsQueries;
  auto& memory = *shared_memory<BackwardMemory<T, kDim, kGradient, Tile>>();
  const MmaPlace place = mma_place<Tile::kOwn>(p, kOwnsQueries);
  const Sequence& sequence = place.sequence;
  const int32_t own_length = kOwnsQueries ? sequence.seqlen_q : sequence.seqlen_k;
  if (place.own_row >= own_length) return;
  const Block block{p, sequence, visible_band(p, sequence)};
  const int32_t group = group_size(p);
  const int32_t head_kv = kOwnsQueries ? place.head / group : place.head;
  const auto k = key_matrix<T>(p.k, p.k_strides, sequence, head_kv, p.head_dim);
  const auto v = key_matrix<T>(p.v, p.v_strides, sequence, head_kv, p.head_dim_v);
  const auto q_of = [&](int32_t head) {
    return query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim);
  };
  const auto grad_out_of = [&](int32_t head) {
    return query_matrix<T>(p.grad_out, p.grad_out_strides, sequence, head, p.head_dim_v);
  };

  const int32_t last_own = min(place.own_row + Tile::kOwn, own_length) - 1;
  const Range others = kOwnsQueries ? keys_seen_by(sequence, block.band, place.own_row, last_own)
                                    : rows_seeing(sequence, block.band, place.own_row, last_own);
  // As in the forward pass: dropout's bits come for four neighbouring keys at once.
  const int32_t first_other = others.begin / 8 * 8;
  const int32_t tiles = others.end > others.begin
                            ? (others.end - first_other + Tile::kOthers - 1) / Tile::kOthers
                            : 0;
  // A key's gradient sums over all query heads that share it.
  const int32_t first_head = kOwnsQueries ? place.head : place.head * group;
  const int32_t steps = kOwnsQueries ? tiles : tiles * group;
  const auto head_of = [&](int32_t step) {
    return kOwnsQueries ? first_head : first_head + step / tiles;
  };
  const auto other_of = [&](int32_t step) {
    return first_other + (kOwnsQueries ? step : step % tiles) * Tile::kOthers;
  };
  const auto begin_copies = [&](int32_t step) {
    auto& to = memory.others[step % Tile::kStages];
    const int32_t row = other_of(step);
    if (kOwnsQueries) {
      copy_rows<Tile::kOthers, kDim, Tile::kThreads>(row, Copy{k, to[0]}, Copy{v, to[1]});
    } else {
      const int32_t head = head_of(step);
      copy_rows<Tile::kOthers, kDim, Tile::kThreads>(row, Copy{q_of(head), to[0]},
                                                     Copy{grad_out_of(head), to[1]});
    }
  };

  const int warp_row = threadIdx.x / kWarpSize * 16 * kM;
  const int32_t own_row = place.own_row + warp_row;
  const int32_t last_own_row = min(own_row + 16 * kM, own_length) - 1;
  RowTerms own_terms[kM][2];
  if (kOwnsQueries) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own_terms[m][half] =
            load_row_terms(p, sequence, place.head, own_row + row_of_element(m, 2 * half));
      }
    }
  }
  // The terms of the queries of a step, one for each of the first threads: loaded before a step's
  // products, and stored after them.
  const bool brings_terms = !kOwnsQueries && threadIdx.x < Tile::kOthers;
  const auto terms_for = [&](int32_t step) {
    return load_row_terms(p, sequence, head_of(step),
                          other_of(step) + static_cast<int32_t>(threadIdx.x));
  };

  if (steps > 0) {
    const auto first = kOwnsQueries ? q_of(place.head) : k;
    const auto second = kOwnsQueries ? grad_out_of(place.head) : v;
    copy_rows<Tile::kOwn, kDim, Tile::kThreads>(place.own_row, Copy{first, memory.own[0]},
                                                Copy{second, memory.own[1]});
    begin_copies(0);
    if (brings_terms) memory.terms[0][threadIdx.x] = terms_for(0);
  }
  ptx::cp_async_commit();

  // The gradients of the own rows: of q or of k, and of v.
  float gradient[kM][kDim / 8][4] = {}, gradient_v[kM][kDim / 8][4] = {};
  for (int32_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there for all, and all are done with the one before
    const bool more = step + 1 < steps;
    RowTerms next_terms{};
    if (more) {
      begin_copies(step + 1);
      if (brings_terms) next_terms = terms_for(step + 1);
    }
    ptx::cp_async_commit();

    const int32_t head = head_of(step), other_row = other_of(step);
    const int32_t num_others =
        min(Tile::kOthers, (kOwnsQueries ? sequence.seqlen_k : sequence.seqlen_q) - other_row);
    const Span own_span{own_row, last_own_row}, other_span{other_row, other_row + num_others - 1};
    const Sight seen = kOwnsQueries ? sight(block.band, own_span, other_span)
                                    : sight(block.band, other_span, own_span);
    if (seen != Sight::kNothing) {
      const auto& tile = memory.others[step % Tile::kStages];
      const auto& terms = memory.terms[step % Tile::kStages];
      float scores[kM][kN][4], dots[kM][kN][4] = {};
      row_products<kDim>(memory.own[0], warp_row, tile[0], scores);
      if (Block::kOfScores) row_products<kDim>(memory.own[1], warp_row, tile[1], dots);
      block.weigh(
          head, own_row, other_row, seen == Sight::kAll && num_others == Tile::kOthers,
          [&](int m, int half, int n, int i) {
            return kOwnsQueries ? own_terms[m][half] : terms[column_of_element(n, i)];
          },
          scores, dots);
      Weights<T, kM, kN> weights;
      if (Block::kOfScores) {
        to_weights<T>(dots, weights);
        accumulate<kDim>(weights, tile[0], gradient);
      }
      if (Block::kOfValues) {
        to_weights<T>(scores, weights);
        accumulate<kDim>(weights, tile[1], gradient_v);
      }
    }
    if (more && brings_terms) memory.terms[(step + 1) % Tile::kStages][threadIdx.x] = next_terms;
  }

  float scale[kM][2], one[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    scale[m][0] = scale[m][1] = p.scale.in_float;
    one[m][0] = one[m][1] = 1.0f;
  }
  if (Block::kOfScores) {
    const auto matrix =
        kOwnsQueries
            ? query_matrix<T>(p.maybe_grad_q, p.grad_q_strides, sequence, place.head, p.head_dim)
            : key_matrix<T>(p.maybe_grad_k, p.grad_k_strides, sequence, place.head, p.head_dim);
    store_rows<kDim>(matrix, place.own_row, memory.own[0], warp_row, gradient, scale);
  }
  if (Block::kOfValues) {
    const auto matrix =
        key_matrix<T>(p.maybe_grad_v, p.grad_v_strides, sequence, place.head, p.head_dim_v);
    store_rows<kDim>(matrix, place.own_row, memory.own[1], warp_row, gradient_v, one);
  }
}

template <typename T, int kDim, MmaGradient kGradient, bool kOptions>
__global__ void __launch_bounds__(BackwardTile<T, kDim, kGradient, kOptions>::kThreads,
                                  BackwardTile<T, kDim, kGradient, kOptions>::kBlocks)
    attention_mma_backward_kernel(const AttentionBackwardParams p) {
  if constexpr (ptx::kArchitecture >= kMmaArchitecture)
    compute_gradients<T, kDim, kGradient, kOptions>(p);
}

template <typename T, int kDim, MmaGradient kGradient, bool kOptions>
Status launch_mma_gradient(const AttentionBackwardParams& p, Stream stream) {
  using Tile = BackwardTile<T, kDim, kGradient, kOptions>;
  constexpr bool kOwnsQueries = kGradient == MmaGradient::kQuery;
  const int64_t blocks = mma_blocks(p, kOwnsQueries, Tile::kOwn);
  if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
  return launch<kMmaArchitecture>(attention_mma_backward_kernel<T, kDim, kGradient, kOptions>,
                                  dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads),
                                  sizeof(BackwardMemory<T, kDim, kGradient, Tile>), stream, p);
}

template <typename T, int kDim, bool kOptions>
Status launch_mma_gradients(const AttentionBackwardParams& p, Stream stream) {
  Status status = nullptr;
  if (p.maybe_grad_q != nullptr) {
    status = launch_mma_gradient<T, kDim, MmaGradient::kQuery, kOptions>(p, stream);
  }
  if (status != nullptr || p.maybe_grad_k == nullptr) return status;
  if constexpr (kDim <= 128) {
    return launch_mma_gradient<T, kDim, MmaGradient::kKeyValue, kOptions>(p, stream);
  } else {
    status = launch_mma_gradient<T, kDim, MmaGradient::kKey, kOptions>(p, stream);
    if (status != nullptr) return status;
    return launch_mma_gradient<T, kDim, MmaGradient::kValue, kOptions>(p, stream);
  }
}

template <typename T>
Status launch_mma_backward(const AttentionBackwardParams& p, Stream stream) {
  return visit_mma_dim<T>(p, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    return has_options(p) ? launch_mma_gradients<T, kDim, true>(p, stream)
                          : launch_mma_gradients<T, kDim, false>(p, stream);
  });
}

}  // namespace
}  // namespace fused
