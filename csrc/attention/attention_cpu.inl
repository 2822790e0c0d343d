// Attention on the CPU, once per instruction set (see attention_cpu.cpp).
//
// The same two tile products as on the GPU, with the rows of the "own" operand as the lanes of the
// vector registers:
//
//   pairs[j][i]  = other[j] . own[i]             own is packed transposed, once per task
//   result[d][i] += sum_j values[j][d] * weights[j][i]
//
// so that the other operand is read as it lies in memory and the softmax, whose rows are lanes,
// needs no reduction across a register. A task is one tile of own rows of one head; queries own the
// forward pass and grad_q, keys own grad_k and grad_v. Every sum has one order: results do not
// depend on the number of threads, nor a row's on the rows beside it.

// Own rows of a task: two stripes of three registers in block_gemm.
template <typename A>
constexpr int32_t kOwnRows = 6 * static_cast<int32_t>(kLanes<A>);
constexpr int32_t kOtherRows = 64;

// clang-format off: each needs those above it
#include "attention/attention_cpu_tile.inl"
#include "attention/attention_cpu_score.inl"
#include "attention/attention_cpu_forward.inl"
#include "attention/attention_cpu_backward.inl"
#include "attention/attention_cpu_score_gradient.inl"
// clang-format on

template <typename A>
static int64_t num_tasks(int64_t batch, int64_t heads, int64_t rows) {
  return batch * heads * ((rows + kOwnRows<A> - 1) / kOwnRows<A>);
}

static Status attention_forward(const AttentionForwardParams& p) {
  return visit_dtype(p.dtype, [&](auto element) -> Status {
    using T = decltype(element);
    parallel_for(0, num_tasks<Accumulator<T>>(p.batch, p.num_heads, p.seqlen_q), 1,
                 [&](int64_t begin, int64_t end) { forward_tasks<T>(p, begin, end); });
    return nullptr;
  });
}

static Status attention_backward(const AttentionBackwardParams& p) {
  return visit_dtype(p.dtype, [&](auto element) -> Status {
    using T = decltype(element);
    using A = Accumulator<T>;
    constexpr int64_t kDeltaGrain = 256;
    parallel_for(0, int64_t{p.batch} * p.num_heads * p.seqlen_q, kDeltaGrain,
                 [&](int64_t begin, int64_t end) { delta_rows<T>(p, begin, end); });
    if (p.maybe_grad_q != nullptr) {
      parallel_for(0, num_tasks<A>(p.batch, p.num_heads, p.seqlen_q), 1,
                   [&](int64_t begin, int64_t end) { backward_tasks<true, T>(p, begin, end); });
    }
    if (p.maybe_grad_k != nullptr) {
      parallel_for(0, num_tasks<A>(p.batch, p.num_heads_kv, p.seqlen_k), 1,
                   [&](int64_t begin, int64_t end) { backward_tasks<false, T>(p, begin, end); });
    }
    if (p.maybe_grad_mask.data != nullptr) score_gradient<T>(p, p.maybe_grad_mask, false);
    if (p.maybe_row_alibi != nullptr) score_gradient<T>(p, row_alibi(p), true);
    if (p.maybe_grad_alibi_slopes != nullptr || p.maybe_grad_sink != nullptr) {
      parallel_for(0, p.num_heads, 1,
                   [&](int64_t begin, int64_t end) { head_sums<A>(p, begin, end); });
    }
    return nullptr;
  });
}
