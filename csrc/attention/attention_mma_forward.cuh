// Attention forward on tensor cores: one pass over the keys with the online softmax of Milakov &
// Gimelshein (arXiv:1805.02867), tiled as in FlashAttention-2 (arXiv:2307.08691, algorithm 1).
//
// A block computes Tile::kOwn rows of one head's output, each warp kM * 16 of them by itself: its
// scores, its softmax and its result never leave its registers. Shared memory has the block's rows
// of q, and a ring of Tile::kStages tiles of k and of v, into which cp.async brings the next ones
// while the products of this one run. Who holds what: attention_mma_tile.cuh.
#pragma once

#include <cfloat>

#include "attention/attention_mma_score.cuh"
#include "attention/attention_split.h"

namespace fused {
namespace {

template <typename T, int kDim, bool kOptions>
using ForwardTile = MmaTile<MmaPass::kForward, T, kOptions, kDim>;

template <typename T, int kDim, typename Tile>
struct ForwardMemory {
  T own[Tile::kOwn * kDim];  // q, and in the end the result
  T k[Tile::kStages][Tile::kOthers * kDim];
  T v[Tile::kStages][Tile::kOthers * kDim];
};

// The softmax so far of the rows that a lane has a part of: lane / 4 + 8 * half of tile m.
template <int kM>
struct MmaSoftmax {
  float max[kM][2];  // of the scores, at least -FLT_MAX; the same in the row's four lanes
  float sum[kM][2];  // of exp(unit * (score - max)), over the lane's own columns
};

// The kernels without options leave scores as the products q . k: the unit of their scores.
template <bool kOptions>
__device__ __forceinline__ float score_unit(const AttentionForwardParams& p) {
  return kOptions ? 1.0f : p.scale.in_float;
}

// Turns scores into their weights, and brings what was summed up so far to the new maximum.
template <int kM, int kN, int kDims>
__device__ __forceinline__ void softmax_step(float unit_log2, float (&scores)[kM][kN][4],
                                             MmaSoftmax<kM>& running,
                                             float (&result)[kM][kDims][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = running.max[m][half];
      float max = before;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        max = fmaxf(max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
      }
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 1));
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 2));
      running.max[m][half] = max;
      factor[half] = exp_below(before, max, unit_log2);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[m][n][i] = exp_below(scores[m][n][i], max, unit_log2);
          sum += scores[m][n][i];
        }
      }
      running.sum[m][half] = running.sum[m][half] * factor[half] + sum;
    }
    // After the first tiles a maximum seldom grows, and nothing is to be done.
    if (!__any_sync(kFullWarp, factor[0] != 1 || factor[1] != 1)) continue;
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) result[m][d][i] *= factor[i / 2];
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void drop(const ScoreTile<true>& tile, float (&weights)[kM][kN][4]) {
  Dropped<kM, kN> dropped;
  dropped.draw(tile);
  for_each_element<kM, kN>([&](int m, int n, int i) {
    weights[m][n][i] *= dropped.scale(m, n, i, tile.p.keep_scale.in_float);
  });
}

// Ends the softmax: log-sum-exp and row stats of the warp's rows go to memory, and what the rows of
// the result are to be multiplied by to `scale`.
template <bool kOptions, int kM>
__device__ __forceinline__ void end_softmax(const AttentionForwardParams& p, const MmaPlace& place,
                                            int32_t first_row, const MmaSoftmax<kM>& running,
                                            float (&scale)[kM][2]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = running.sum[m][half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const float max = running.max[m][half] * score_unit<kOptions>(p);
      const RowEnd<float> end = end_row(p, place.head, max, sum);
      scale[m][half] = end.scale;
      const int32_t row = first_row + row_of_element(m, 2 * half);
      if (lane % 4 == 0 && row < place.sequence.seqlen_q) {
        store_row_end(p, row_of_all(p, place.sequence, place.head, row), end);
      }
    }
  }
}

template <typename T, int kDim, bool kOptions, bool kPaged>
__device__ __forceinline__ void attend(const AttentionForwardParams& p) {
  using Tile = ForwardTile<T, kDim, kOptions>;
  constexpr int kM = Tile::kRowTiles, kN = Tile::kOthers / 8;
  auto& memory = *shared_memory<ForwardMemory<T, kDim, Tile>>();
  const MmaPlace place = mma_place<Tile::kOwn>(p, true);
  const Sequence& sequence = place.sequence;
  if (place.own_row >= sequence.seqlen_q || is_split(p, sequence)) return;
  const int32_t head_kv = key_head(p, place.head);
  const auto q = query_matrix<T>(p.q, p.q_strides, sequence, place.head, p.head_dim);
  const auto k = cache_matrix<kPaged, T>(p, p.k, p.k_strides, sequence, head_kv, p.head_dim);
  const auto v = cache_matrix<kPaged, T>(p, p.v, p.v_strides, sequence, head_kv, p.head_dim_v);
  const int warp_row = threadIdx.x / kWarpSize * 16 * kM;
  const int32_t first_row = place.own_row + warp_row;
  const int32_t last_row = min(first_row + 16 * kM, sequence.seqlen_q) - 1;

  const Band band = visible_band(p, sequence);
  const Range keys = keys_seen_by(sequence, band, place.own_row,
                                  min(place.own_row + Tile::kOwn, sequence.seqlen_q) - 1);
  // On a multiple of 8, so that the pairs of columns that lanes have are pairs of dropout's too.
  const int32_t first_key = keys.begin / 8 * 8;
  const int32_t num_tiles =
      keys.end > keys.begin ? (keys.end - first_key + Tile::kOthers - 1) / Tile::kOthers : 0;
  const auto begin_copies = [&](int32_t tile) {
    const int stage = tile % Tile::kStages;
    const int32_t key = first_key + tile * Tile::kOthers;
    copy_rows<Tile::kOthers, kDim, Tile::kThreads>(key, Copy{k, memory.k[stage]},
                                                   Copy{v, memory.v[stage]});
  };

  float result[kM][kDim / 8][4] = {};
  MmaSoftmax<kM> running;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    running.max[m][0] = running.max[m][1] = -FLT_MAX;
    running.sum[m][0] = running.sum[m][1] = 0;
  }
  if (num_tiles > 0)
    copy_rows<Tile::kOwn, kDim, Tile::kThreads>(place.own_row, Copy{q, memory.own});
#pragma unroll
  for (int tile = 0; tile < Tile::kStages - 1; ++tile) {
    if (tile < num_tiles) begin_copies(tile);
    ptx::cp_async_commit();  // an empty group too, so that they can be counted
  }

  const float unit_log2 = score_unit<kOptions>(p) * kLog2E;
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the tile is there for all, and all are done with the one before
    if (tile + Tile::kStages - 1 < num_tiles) begin_copies(tile + Tile::kStages - 1);
    ptx::cp_async_commit();

    const int32_t key = first_key + tile * Tile::kOthers;
    const int32_t num_keys = min(Tile::kOthers, sequence.seqlen_k - key);
    const Sight seen = sight(band, {first_row, last_row}, {key, key + num_keys - 1});
    if (seen == Sight::kNothing) continue;
    const int stage = tile % Tile::kStages;
    float scores[kM][kN][4];
    row_products<kDim>(memory.own, warp_row, memory.k[stage], scores);
    const ScoreTile<true> score_tile{p, sequence, band, place.head, first_row, key};
    if (kOptions) {
      for_each_element<kM, kN>([&](int m, int n, int i) {
        scores[m][n][i] = __fmul_rn(scores[m][n][i], p.scale.in_float);
      });
      score_tile.apply_options(scores, [](int, int, int, float) {});
    }
    if (seen != Sight::kAll || num_keys != Tile::kOthers) score_tile.hide_outside(scores);
    softmax_step(unit_log2, scores, running, result);
    if (kOptions && p.maybe_rng != nullptr) drop(score_tile, scores);
    Weights<T, kM, kN> weights;
    to_weights<T>(scores, weights);
    accumulate<kDim>(weights, memory.v[stage], result);
  }

  float row_scale[kM][2];
  end_softmax<kOptions>(p, place, first_row, running, row_scale);
  const auto out = query_matrix<T>(p.out, p.out_strides, sequence, place.head, p.head_dim_v);
  store_rows<kDim>(out, place.own_row, memory.own, warp_row, result, row_scale);
}

template <typename T, int kDim, bool kOptions, bool kPaged>
__global__ void __launch_bounds__(ForwardTile<T, kDim, kOptions>::kThreads,
                                  ForwardTile<T, kDim, kOptions>::kBlocks)
    attention_mma_forward_kernel(const AttentionForwardParams p) {
  if constexpr (ptx::kArchitecture >= kMmaArchitecture) attend<T, kDim, kOptions, kPaged>(p);
}

template <typename T, int kDim, bool kOptions, bool kPaged = false>
Status launch_mma_forward(const AttentionForwardParams& p, Stream stream) {
  using Tile = ForwardTile<T, kDim, kOptions>;
  const int64_t blocks = mma_blocks(p, true, Tile::kOwn);
  if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";
  return launch<kMmaArchitecture>(attention_mma_forward_kernel<T, kDim, kOptions, kPaged>,
                                  dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads),
                                  sizeof(ForwardMemory<T, kDim, Tile>), stream, p);
}

template <typename T>
Status launch_mma_forward(const AttentionForwardParams& p, Stream stream) {
  return visit_mma_dim<T>(p, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    // Pages have the instance with options alone, for each more takes long to compile. Not timed.
    if (p.maybe_block_table != nullptr) return launch_mma_forward<T, kDim, true, true>(p, stream);
    return has_options(p) ? launch_mma_forward<T, kDim, true>(p, stream)
                          : launch_mma_forward<T, kDim, false>(p, stream);
  });
}

}  // namespace
}  // namespace fused
