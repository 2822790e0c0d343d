// Which forward passes on CUDA split their keys over blocks, and the working memory that takes.
#pragma once

#include "attention/attention_sequence.h"

namespace fused {

// Sequences of so few queries, as in decoding, have a forward pass of their own, in which the work
// is dealt out by keys.
constexpr int32_t kFewQueries = 4;
FUSED_HOST_DEVICE bool has_few_queries(const Sequence& sequence) {
  return sequence.seqlen_q <= kFewQueries;
}

// Keys of a block, whatever else there is: a sequence's result is the same in any batch.
constexpr int32_t kSplitKeys = 128;

// Room for the rows of a sequence in all query heads that share a key head.
FUSED_HOST_DEVICE int32_t num_split_rows(const AttentionProblem& p) {
  return group_size(p) * (p.seqlen_q < kFewQueries ? p.seqlen_q : kFewQueries);
}

// Elements, of the type of lse, that the forward pass needs as maybe_partials; 0 if it splits
// nothing: [B, G, tile slots of kSplitKeys keys, split rows, Dv + 2].
inline int64_t split_partials(const AttentionProblem& p) {
  // Packed sequences may be of either kind.
  if (p.maybe_cu_seqlens_q == nullptr && p.seqlen_q > kFewQueries) return 0;
  if (p.num_heads == 0) return 0;
  return int64_t{p.batch} * p.num_heads_kv * num_tile_slots(p, false, kSplitKeys) *
         num_split_rows(p) * (p.head_dim_v + 2);
}

// Whether a sequence is left to attention_split_forward.
FUSED_HOST_DEVICE bool is_split(const AttentionForwardParams& p, const Sequence& sequence) {
  return p.maybe_partials != nullptr && has_few_queries(sequence);
}

// The sequences that are split, of params with maybe_partials.
Status attention_split_forward(const AttentionForwardParams& params, Stream stream);

}  // namespace fused
