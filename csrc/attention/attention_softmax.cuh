// The online softmax of the portable attention kernels: lane j of a warp has the score of key j of
// the tile, for one of the warp's rows after another.
#pragma once

#include "attention/attention_score.h"
#include "attention/attention_tile.cuh"

namespace fused {

constexpr int kRowsPerWarp = kOwn / (kAttentionThreads / kWarpSize);

// The softmax so far of a warp's rows.
template <typename A>
struct RunningSoftmax {
  A max = -INFINITY;         // of the scores: of the warp's row r in lane r, to save registers
  A sum[kRowsPerWarp] = {};  // of exp(score - max), the same in all lanes
};

// Keeps the value of the warp's row r, which all lanes have, if the thread's result has that row.
template <typename A>
__device__ __forceinline__ void keep_result_row(int lane, int r, A value,
                                                A (&of_result)[kRowsPerThread]) {
  const int first_row = lane / 16 * kRowsPerThread;
  if (r >= first_row && r < first_row + kRowsPerThread) of_result[r % kRowsPerThread] = value;
}

// Turns the scores in tiles.weights into exp(score - max) (with dropout applied) and returns in
// `rescale` what each of the thread's result rows is to be multiplied by. `take` hears of each of
// the warp's rows, whose sum has grown already, by how much, the lane's weight without dropout, and
// the one that counts.
template <typename A, typename Take>
__device__ __forceinline__ void softmax_step(const AttentionProblem& p, const BlockPlace& place,
                                             int32_t key_row, AttentionTiles<A>& tiles,
                                             RunningSoftmax<A>& running,
                                             A (&rescale)[kRowsPerThread], Take take) {
  const int warp_row = threadIdx.x / kWarpSize * kRowsPerWarp, lane = threadIdx.x % kWarpSize;
  const Sequence& sequence = place.sequence;
  __syncwarp();  // the scores come from all lanes
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const A score = tiles.weights[warp_row + r][lane];
    const A old_max = __shfl_sync(kFullWarp, running.max, r);
    A new_max = warp_max(score);
    new_max = old_max > new_max ? old_max : new_max;
    // A row without a key so far has no maximum: anything finite will do, its weights are 0.
    const A shift = new_max == -INFINITY ? A(0) : new_max;
    const A factor = exp(old_max - shift);
    const A weight = exp(score - shift);
    const A of_tile = warp_sum(weight);
    A kept = weight;
    running.sum[r] = running.sum[r] * factor + of_tile;
    if (lane == r) running.max = new_max;
    keep_result_row(lane, r, factor, rescale);
    const int32_t row = place.own_row + warp_row + r, column = key_row + lane;
    if (p.maybe_rng != nullptr && row < sequence.seqlen_q && column < sequence.seqlen_k) {
      kept *= dropout_scale<A>(p, sequence, place.head, row, column);
    }
    tiles.weights[warp_row + r][lane] = kept;
    take(r, of_tile, weight, kept);
  }
}

// Ends the softmax of the warp's rows, writes how each one ended, and returns in `row_scale` what
// each of the thread's result rows is to be multiplied by. `take` hears of each of the warp's rows
// how it ended.
template <typename A, typename Take>
__device__ __forceinline__ void end_rows(const AttentionForwardParams& p, const BlockPlace& place,
                                         const RunningSoftmax<A>& running,
                                         A (&row_scale)[kRowsPerThread], Take take) {
  const int warp_row = threadIdx.x / kWarpSize * kRowsPerWarp, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const RowEnd<A> end =
        end_row(p, place.head, __shfl_sync(kFullWarp, running.max, r), running.sum[r]);
    keep_result_row(lane, r, end.scale, row_scale);
    const int32_t row = place.own_row + warp_row + r;
    const bool writes = lane == 0 && place.column == 0 && row < place.sequence.seqlen_q;
    const int64_t index = row_of_all(p, place.sequence, place.head, row);
    if (writes) store_row_end(p, index, end);
    take(r, end, writes, index);
  }
}

}  // namespace fused
