// Which forward passes on CUDA split their keys over blocks, and the working memory that takes.
#pragma once

#include "attention/attention_sequence.h"

namespace fused {

constexpr int32_t kSplitQueries = 4;  // of so few, decoding, a tile of queries would be empty
constexpr int32_t kSplitKeys = 128;   // of a block, whatever else there is: a sequence's result
                                      // is the same in any batch

// How many chunks of keys there is room for in each sequence.
FUSED_HOST_DEVICE int32_t num_splits(const AttentionProblem& p) {
  return (p.seqlen_k + kSplitKeys - 1) / kSplitKeys;
}

// Elements, of the type of lse, that the forward pass needs as maybe_partials; 0 if it needs none:
// [B, G, splits, rows, Dv + 2], with the rows of all query heads that share a key head.
inline int64_t split_partials(const AttentionProblem& p) {
  if (p.maybe_cu_seqlens_q != nullptr || p.seqlen_q > kSplitQueries) return 0;
  return int64_t{p.batch} * p.num_heads * p.seqlen_q * num_splits(p) * (p.head_dim_v + 2);
}

// With maybe_partials.
Status attention_split_forward(const AttentionForwardParams& params, Stream stream);

}  // namespace fused
