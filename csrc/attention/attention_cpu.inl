// Attention on the CPU, once per instruction set (see attention_cpu.cpp).
//
// Tiles of the score matrix as on the GPU, with the rows of the "own" operand as the lanes of the
// vector registers:
//
//   pairs[j][i]  = other[j] . own[i]             own is packed transposed
//   result[d][i] += sum_j values[j][d] * weights[j][i]
//   result[j][d] += sum_i weights[j][i] * own[i][d]
//
// so that the softmax, whose rows are lanes, needs no reduction across a register. Queries own the
// forward pass; keys own it where there are few queries, and the backward pass. Every sum has one
// order: results do not depend on the number of threads, nor a row's on the rows beside it.

// A tile's own rows, as lanes: what one stripe of block_gemm takes at a time, or two.
template <typename E>
constexpr int32_t kOwnRows = (FUSED_VECTOR_BYTES == 64 ? 4 : 6) * static_cast<int32_t>(kLanes<E>);
constexpr int32_t kOtherRows = 64;

template <typename A>
static int64_t num_tiles(int64_t rows) {
  return (rows + kOwnRows<A> - 1) / kOwnRows<A>;
}

// A task is a slot of own_tile, of so many rows, for one head.
static inline int64_t num_tasks(const AttentionProblem& p, bool owns_queries, int32_t rows) {
  return int64_t{p.batch} * (owns_queries ? p.num_heads : p.num_heads_kv) *
         num_tile_slots(p, owns_queries, rows);
}

struct TaskPlace {
  Sequence sequence;
  int32_t head, row;  // a row behind the sequence leaves nothing to do
};

static inline TaskPlace task_place(const AttentionProblem& p, bool owns_queries, int32_t rows,
                                   int64_t task) {
  const int64_t slots = num_tile_slots(p, owns_queries, rows);
  const int32_t heads = owns_queries ? p.num_heads : p.num_heads_kv;
  const OwnTile tile = own_tile(p, owns_queries, static_cast<int32_t>(task / slots / heads),
                                static_cast<int32_t>(task % slots), rows);
  return {tile.sequence, static_cast<int32_t>(task / slots % heads), tile.row};
}

// clang-format off: each needs those above it
#include "attention/attention_cpu_transpose.inl"
#include "attention/attention_cpu_operand.inl"
#include "attention/attention_cpu_tile.inl"
#include "attention/attention_cpu_score.inl"
#include "attention/attention_cpu_decode.inl"
#include "attention/attention_cpu_forward.inl"
#include "attention/attention_cpu_weights.inl"
#include "attention/attention_cpu_tangent.inl"
#include "attention/attention_cpu_backward.inl"
#include "attention/attention_cpu_score_gradient.inl"
// clang-format on

template <typename T>
static Status attention_forward_of(const AttentionForwardParams& p) {
  // Packed sequences may be of either kind.
  const bool packed = p.maybe_cu_seqlens_q != nullptr;
  if (packed || p.seqlen_q <= kQueriesOfDecode) decode<T>(p);
  if (!packed && p.seqlen_q <= kQueriesOfDecode) return nullptr;
  run_query_tasks<ForwardPass<T>>(p);
  return nullptr;
}

template <typename T>
static Status attention_tangent_of(const AttentionTangentParams& p) {
  run_query_tasks<TangentPass<T>>(p);
  return nullptr;
}

template <typename T>
static Status attention_backward_of(const AttentionBackwardParams& p) {
  using A = Accumulator<T>;
  constexpr int64_t kDeltaGrain = 256;
  parallel_for(0, int64_t{p.batch} * p.num_heads * p.seqlen_q, kDeltaGrain,
               [&](int64_t begin, int64_t end) { delta_rows<T>(p, begin, end); });
  backward_operands<T>(p);
  if (p.maybe_grad_mask.data != nullptr) mask_gradient<T>(p);
  if (p.maybe_row_alibi != nullptr) row_alibi<T>(p);
  if (p.maybe_grad_alibi_slopes != nullptr || p.maybe_grad_sink != nullptr) {
    parallel_for(0, p.num_heads, 1,
                 [&](int64_t begin, int64_t end) { head_sums<A>(p, begin, end); });
  }
  return nullptr;
}

#if FUSED_BFLOAT16_PAIRS
static Status attention_forward(const AttentionForwardParams& p) {
  return attention_forward_of<BFloat16>(p);
}
static Status attention_tangent(const AttentionTangentParams& p) {
  return attention_tangent_of<BFloat16>(p);
}
static Status attention_backward(const AttentionBackwardParams& p) {
  return attention_backward_of<BFloat16>(p);
}
#else
static Status attention_forward(const AttentionForwardParams& p) {
  return visit_dtype(p.dtype,
                     [&](auto element) { return attention_forward_of<decltype(element)>(p); });
}
static Status attention_tangent(const AttentionTangentParams& p) {
  return visit_dtype(p.dtype,
                     [&](auto element) { return attention_tangent_of<decltype(element)>(p); });
}
static Status attention_backward(const AttentionBackwardParams& p) {
  return visit_dtype(p.dtype,
                     [&](auto element) { return attention_backward_of<decltype(element)>(p); });
}
#endif
