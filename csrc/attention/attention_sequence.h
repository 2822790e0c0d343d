// Where each sequence of a batch lies, which of its keys a row sees, and how tiles of rows are
// dealt out. The same on every backend, and for sequences of one length as for packed ones.
#pragma once

#include "attention/attention.h"

namespace fused {

struct Range {
  int32_t begin, end;
};

// One sequence of the batch. The rows and columns of its score matrix count from its own first
// query and key.
struct Sequence {
  int32_t index;             // among the sequences: for the mask, and for dropout
  int32_t batch;             // of the tensors, where it lies
  int32_t first_q, first_k;  // its first rows there
  int32_t seqlen_q, seqlen_k;
  bool sees_nothing;  // the rows behind the last packed sequence, which belong to none
};

// Rows of a sequence in a packed tensor of `length` rows; what is behind the last is the rest. Rows
// outside the tensor are nobody's, whatever cu_seqlens says: nobody waits for it to check it.
FUSED_HOST_DEVICE Range packed_rows(const int32_t* cu_seqlens, int32_t num_sequences, int32_t index,
                                    int32_t length) {
  const auto clamped = [=](int32_t row, int32_t low) {
    return row < low ? low : row > length ? length : row;
  };
  const int32_t begin = index == 0 ? 0 : clamped(cu_seqlens[index], 0);
  return {begin, index == num_sequences ? length : clamped(cu_seqlens[index + 1], begin)};
}

// Of a sequence that is not packed: no more than there is room for, whatever cache_seqlens says.
FUSED_HOST_DEVICE int32_t num_keys(const AttentionProblem& p, int32_t index) {
  if (p.maybe_cache_seqlens == nullptr) return p.seqlen_k;
  const int64_t keys = static_cast<int64_t>(p.maybe_cache_seqlens[index]) + p.num_new_keys;
  return static_cast<int32_t>(keys < 0 ? 0 : keys > p.seqlen_k ? p.seqlen_k : keys);
}

// Sequence `index`; of packed ones there is one more than num_sequences, the rest.
FUSED_HOST_DEVICE Sequence sequence_of(const AttentionProblem& p, int32_t index) {
  if (p.maybe_cu_seqlens_q == nullptr) {
    return {index, index, 0, 0, p.seqlen_q, num_keys(p, index), false};
  }
  const Range q = packed_rows(p.maybe_cu_seqlens_q, p.num_sequences, index, p.seqlen_q);
  const Range k = packed_rows(p.maybe_cu_seqlens_k, p.num_sequences, index, p.seqlen_k);
  return {index, 0, q.begin, k.begin, q.end - q.begin, k.end - k.begin, index == p.num_sequences};
}

// The query heads that share a key head lie side by side: how many, and the key head of one.
FUSED_HOST_DEVICE int32_t group_size(const AttentionProblem& p) {
  return p.num_heads / p.num_heads_kv;
}
FUSED_HOST_DEVICE int32_t key_head(const AttentionProblem& p, int32_t head) {
  return head / group_size(p);
}

// All that have rows: behind the last packed sequence may be some that are none's.
FUSED_HOST_DEVICE int64_t num_sequences_and_rest(const AttentionProblem& p) {
  return int64_t{p.num_sequences} + (p.maybe_cu_seqlens_q != nullptr);
}

// A tile of rows of one operand: where it starts in its sequence. Empty if that is behind its end.
struct OwnTile {
  Sequence sequence;
  int32_t row;
};

// Tiles of `tile` rows have slots. Tile t of packed sequence b has slot cu_seqlens[b] / tile + b +
// t: room for all without a sum over the sequences before it, and one empty slot a sequence at
// most.
FUSED_HOST_DEVICE int32_t first_slot(const int32_t* cu_seqlens, int32_t index, int32_t tile) {
  if (index == 0) return 0;
  return (cu_seqlens[index] > 0 ? cu_seqlens[index] / tile : 0) + index;
}

// For the queries, or for the keys, of one head.
FUSED_HOST_DEVICE int64_t num_tile_slots(const AttentionProblem& p, bool of_queries, int32_t tile) {
  const int64_t length = of_queries ? p.seqlen_q : p.seqlen_k;
  if (p.maybe_cu_seqlens_q == nullptr) return (length + tile - 1) / tile;
  return length / tile + p.num_sequences + 1;
}

FUSED_HOST_DEVICE OwnTile own_tile(const AttentionProblem& p, bool of_queries, int32_t batch,
                                   int32_t slot, int32_t tile) {
  if (p.maybe_cu_seqlens_q == nullptr) return {sequence_of(p, batch), slot * tile};
  const int32_t* cu_seqlens = of_queries ? p.maybe_cu_seqlens_q : p.maybe_cu_seqlens_k;
  int32_t first = 0, last = p.num_sequences;  // the last that begins at this slot or before it
  while (first < last) {
    const int32_t middle = first + (last - first + 1) / 2;
    if (first_slot(cu_seqlens, middle, tile) <= slot) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return {sequence_of(p, first), (slot - first_slot(cu_seqlens, first, tile)) * tile};
}

// The slot of a sequence's first tile of keys.
FUSED_HOST_DEVICE int32_t first_key_slot(const AttentionProblem& p, const Sequence& sequence,
                                         int32_t tile) {
  if (p.maybe_cu_seqlens_k == nullptr) return 0;
  return first_slot(p.maybe_cu_seqlens_k, sequence.index, tile);
}

// Where row `row` of a sequence lies in lse, and in whatever else is [B, H, S].
FUSED_HOST_DEVICE int64_t row_of_all(const AttentionProblem& p, const Sequence& sequence,
                                     int32_t head, int32_t row) {
  return (static_cast<int64_t>(sequence.batch) * p.num_heads + head) * p.seqlen_q +
         sequence.first_q + row;
}

// The first element of a sequence's rows in one head of an operand. Without a sign the head costs
// no register for its upper half.
template <typename T>
FUSED_HOST_DEVICE T* query_rows(T* data, const HeadStrides& strides, const Sequence& sequence,
                                uint32_t head) {
  return data + sequence.batch * strides.batch + head * strides.head +
         sequence.first_q * strides.row;
}
template <typename T>
FUSED_HOST_DEVICE T* key_rows(T* data, const HeadStrides& strides, const Sequence& sequence,
                              uint32_t head) {
  return data + sequence.batch * strides.batch + head * strides.head +
         sequence.first_k * strides.row;
}

// Row i sees the keys j with low <= j - i <= high: causality and the window in one.
struct Band {
  int32_t low, high;
};

FUSED_HOST_DEVICE Band visible_band(const AttentionProblem& problem, const Sequence& sequence) {
  constexpr int64_t kFar = kMaxLength;  // no element is as far from the diagonal
  if (sequence.sees_nothing) return {kMaxLength, -kMaxLength};
  const int64_t aligned = static_cast<int64_t>(sequence.seqlen_k) - sequence.seqlen_q;
  const int64_t low = problem.window_left < 0 ? -kFar : aligned - problem.window_left;
  int64_t high = problem.window_right < 0 ? kFar : aligned + problem.window_right;
  if (problem.causal && high > 0) high = 0;
  return {static_cast<int32_t>(low < -kFar ? -kFar : low),
          static_cast<int32_t>(high > kFar ? kFar : high)};
}

FUSED_HOST_DEVICE bool is_visible(const Band& band, int32_t row, int32_t column) {
  return column - row >= band.low && column - row <= band.high;
}

FUSED_HOST_DEVICE Range clamped_range(int64_t begin, int64_t end, int32_t length) {
  return {static_cast<int32_t>(begin > 0 ? begin : 0),
          static_cast<int32_t>(end < length ? end : length)};
}

// The keys that any of the rows first .. last sees. Where there are none, end <= begin.
FUSED_HOST_DEVICE Range keys_seen_by(const Sequence& sequence, const Band& band, int32_t first,
                                     int32_t last) {
  return clamped_range(static_cast<int64_t>(first) + band.low,
                       static_cast<int64_t>(last) + band.high + 1, sequence.seqlen_k);
}

// The rows that see any of the keys first .. last. Where there are none, end <= begin.
FUSED_HOST_DEVICE Range rows_seeing(const Sequence& sequence, const Band& band, int32_t first,
                                    int32_t last) {
  return clamped_range(static_cast<int64_t>(first) - band.high,
                       static_cast<int64_t>(last) - band.low + 1, sequence.seqlen_q);
}

// How far key `column` is from where `row` stands among the keys: what ALiBi slopes multiply.
FUSED_HOST_DEVICE int32_t alibi_distance(const Sequence& sequence, int32_t row, int32_t column) {
  const int32_t ahead = row - column + (sequence.seqlen_k - sequence.seqlen_q);
  return ahead < 0 ? -ahead : ahead;
}

}  // namespace fused
