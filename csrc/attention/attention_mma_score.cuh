// What becomes of a warp's tile of scores: the steps of final_score (attention_score.h) in its
// order, each for the whole tile. Element by element every option would be a branch of each one,
// and no two loads of a mask would be under way at once.
#pragma once

#include "attention/attention_mma_tile.cuh"

namespace fused {

// Where the tile lies: own rows are queries or keys.
template <bool kOwnsQueries>
struct ScoreTile {
  const AttentionProblem& p;
  const Sequence& sequence;
  const Band& band;
  int32_t head, first_own, first_other;

  __device__ __forceinline__ int32_t row_of(int m, int n, int i) const {
    return kOwnsQueries ? first_own + row_of_element(m, i) : first_other + column_of_element(n, i);
  }
  __device__ __forceinline__ int32_t column_of(int m, int n, int i) const {
    return kOwnsQueries ? first_other + column_of_element(n, i) : first_own + row_of_element(m, i);
  }

  // Makes scores of scale * q . k, but for what hide_outside() hides. take_slope(m, n, i, slope)
  // hears of derivatives that are not 1.
  template <int kM, int kN, typename TakeSlope>
  __device__ __forceinline__ void apply_options(float (&scores)[kM][kN][4],
                                                const TakeSlope& take_slope) const {
    const float softcap = p.softcap.in_float;
    if (softcap != 0) {
      for_each_element<kM, kN>([&](int m, int n, int i) {
        const Score<float> score = softcapped(softcap, std::tanh(scores[m][n][i] / softcap));
        scores[m][n][i] = score.value;
        take_slope(m, n, i, score.slope);
      });
    }
    if (p.maybe_alibi_slopes != nullptr) {
      const float slope = static_cast<const float*>(p.maybe_alibi_slopes)[head];
      for_each_element<kM, kN>([&](int m, int n, int i) {
        const int32_t distance = alibi_distance(sequence, row_of(m, n, i), column_of(m, n, i));
        scores[m][n][i] -= slope * static_cast<float>(distance);
      });
    }
    if (p.mask.kind != MaskKind::kNone) apply_mask(scores);
  }

  // Loads all of a lane's elements before it uses the first. One that lies outside has another's
  // address: loads under a condition would come one by one.
  template <int kM, int kN>
  __device__ __forceinline__ void apply_mask(float (&scores)[kM][kN][4]) const {
    const AttentionMask& mask = p.mask;
    const int32_t rows = min(sequence.seqlen_q, mask.rows);
    const int32_t columns = min(sequence.seqlen_k, mask.columns);
    if (rows == 0 || columns == 0) {  // there is no address
      for_each_element<kM, kN>([&](int m, int n, int i) { scores[m][n][i] = kHiddenScore<float>; });
      return;
    }
    visit_mask(mask, [&](auto zero) {
      const auto* from = static_cast<const decltype(zero)*>(mask.data);
      decltype(zero) elements[kM][kN][4];
      for_each_element<kM, kN>([&](int m, int n, int i) {
        const int32_t row = min(row_of(m, n, i), rows - 1);
        const int32_t column = min(column_of(m, n, i), columns - 1);
        elements[m][n][i] = from[mask_offset(mask, sequence, head, row, column)];
      });
      for_each_element<kM, kN>([&](int m, int n, int i) {
        const bool inside = row_of(m, n, i) < rows && column_of(m, n, i) < columns;
        float& score = scores[m][n][i];
        score = inside ? masked(score, elements[m][n][i]) : kHiddenScore<float>;
      });
    });
  }

  // Hides what lies outside the matrix or the band.
  template <int kM, int kN>
  __device__ __forceinline__ void hide_outside(float (&scores)[kM][kN][4]) const {
    for_each_element<kM, kN>([&](int m, int n, int i) {
      const int32_t row = row_of(m, n, i), column = column_of(m, n, i);
      const bool seen =
          row < sequence.seqlen_q && column < sequence.seqlen_k && is_visible(band, row, column);
      if (!seen) scores[m][n][i] = kHiddenScore<float>;
    });
  }
};

// Which of a lane's elements dropout takes; none, to begin with.
template <int kM, int kN>
struct Dropped {
  static_assert(kN <= 8, "a bit for each element");
  uint32_t bits[kM] = {};  // bit 4n + i of [m]

  __device__ __forceinline__ float scale(int m, int n, int i, float keep_scale) const {
    return bits[m] >> (4 * n + i) & 1 ? 0.0f : keep_scale;
  }

  // Of a tile on multiples of 8, by the whole warp. The four columns of a Philox call lie in two
  // lanes, two in each, or in four lanes where own rows are keys. They share two calls for each n,
  // or four, so that each lane makes one of them and they exchange what they found.
  template <bool kOwnsQueries>
  __device__ __forceinline__ void draw(const ScoreTile<kOwnsQueries>& tile) {
    const int lane = threadIdx.x % kWarpSize;
    const int called =
        kOwnsQueries ? lane % 2 * 2 : lane / 4 % 4;  // the element i that it asks for
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t found = 0;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int32_t row = tile.row_of(m, n, called), column = tile.column_of(m, n, called);
        found |= dropped_columns(tile.p, tile.sequence, tile.head, row, column) << 4 * n;
      }
      bits[m] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int caller = kOwnsQueries ? lane / 2 * 2 + i / 2 : lane / 16 * 16 + 4 * i + lane % 4;
        const uint32_t columns = __shfl_sync(kFullWarp, found, caller);
        bits[m] |= (columns >> tile.column_of(m, 0, i) % 4 & 0x11111111u) << i;
      }
    }
  }
};

}  // namespace fused
