// Into how many parts CUDA kernels cut what the gradient of a broadcast mask adds up, and the
// working memory that takes. Shapes alone say so: each sum has the same order on every machine.
#pragma once

#include <algorithm>

#include "attention/attention.h"

namespace fused {

// A tile of the gradient, and a tile of each score matrix that is added up to it.
constexpr int32_t kScoreRows = 64, kScoreKeys = 32;

// Blocks that fill any GPU a few times over, and the tiles of scores that a part shall have at
// least, by the mean, to be worth a block. Neither is tuned on a GPU.
constexpr int64_t kScoreBlocks = 1024;
constexpr int64_t kScoreSteps = 8;

FUSED_HOST_DEVICE int32_t num_tiles(int32_t length, int32_t tile) {
  return (length + tile - 1) / tile;
}

// Part i of n takes every n-th sequence, row tile or key tile from i on: under causality parts are
// then alike. Heads stay together, since they are few.
struct ScoreParts {
  int32_t sequences = 1, row_tiles = 1, key_tiles = 1;

  int32_t total() const { return sequences * row_tiles * key_tiles; }
};

// The fewest parts of `extent` of which none is longer than with as many as are wanted.
inline int32_t take_parts(int64_t extent, int64_t& wanted) {
  if (wanted <= 1) return 1;
  const int64_t longest = (extent + wanted - 1) / wanted, parts = (extent + longest - 1) / longest;
  wanted /= parts;
  return static_cast<int32_t>(parts);
}

// Where each sequence has a mask of its own, it is cut as if alone: its gradient is the same in any
// batch. Of packed sequences the mean length counts, for no other is known here.
inline ScoreParts score_parts(const AttentionProblem& p, const ScoreGradient& gradient) {
  const auto mean = [&](int32_t length) {
    return p.maybe_cu_seqlens_q == nullptr || p.num_sequences == 0
               ? length
               : (length + p.num_sequences - 1) / p.num_sequences;
  };
  const bool over_rows = gradient.row_stride == 0, over_keys = gradient.column_stride == 0;
  const int64_t sequences = gradient.batch_stride == 0 ? p.num_sequences : 1;
  const int64_t rows = over_rows ? num_tiles(mean(p.seqlen_q), kScoreRows) : 1;
  const int64_t keys = over_keys ? num_tiles(mean(p.seqlen_k), kScoreKeys) : 1;
  const int64_t heads = gradient.head_stride == 0 ? p.num_heads : 1;
  const int64_t tiles = (gradient.head_stride == 0 ? 1 : int64_t{p.num_heads}) *
                        (over_rows ? 1 : num_tiles(p.mask.rows, kScoreRows)) *
                        (over_keys ? 1 : num_tiles(p.mask.columns, kScoreKeys));
  int64_t wanted = std::min(kScoreBlocks / tiles, sequences * heads * rows * keys / kScoreSteps);
  ScoreParts parts;
  parts.sequences = take_parts(sequences, wanted);
  parts.row_tiles = take_parts(rows, wanted);
  parts.key_tiles = take_parts(keys, wanted);
  return parts;
}

// Elements of the mask's gradient.
FUSED_HOST_DEVICE int64_t score_gradient_size(const AttentionProblem& p,
                                              const ScoreGradient& gradient) {
  return (gradient.batch_stride == 0 ? int64_t{1} : p.num_sequences) *
         (gradient.head_stride == 0 ? 1 : p.num_heads) *
         (gradient.row_stride == 0 ? 1 : p.mask.rows) *
         (gradient.column_stride == 0 ? 1 : p.mask.columns);
}

// Elements that it needs as maybe_partials, a gradient for each part; 0 for one part. No more than
// kScoreBlocks tiles (8 MB of floats) or, where each sequence has a mask of its own and so only
// rows or columns are cut, than kScoreBlocks * kScoreRows (256 KB) for each sequence.
inline int64_t score_partials(const AttentionProblem& p, const ScoreGradient& gradient) {
  const int32_t parts = score_parts(p, gradient).total();
  return parts == 1 ? 0 : parts * score_gradient_size(p, gradient);
}

}  // namespace fused
