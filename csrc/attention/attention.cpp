// The glue of attention: checks once, allocates, fills the params and picks the backend.
#include "attention/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "attention/attention_ops.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace fused {
namespace {

constexpr const char* kOp = "attention";

// Kernels ask for a contiguous last dimension and take any other stride.
at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

HeadStrides head_strides(const at::Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// [batch, heads, length, width], laid out as [batch, length, heads, width]: what the layer after an
// attention reads in order. Not a view, which nobody could change in place once it has a
// derivative.
at::Tensor empty_heads(const at::Tensor& like, int64_t batch, int64_t heads, int64_t length,
                       int64_t width) {
  return at::empty_strided({batch, heads, length, width},
                           {length * heads * width, width, heads * width, 1}, like.options());
}

void check_operands(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_device(kOp, "q", q);
  check_dim(kOp, "q", q, 4);
  dtype_of(kOp, "q", q);
  const auto check = [&](const char* argument, const at::Tensor& tensor) {
    check_dim(kOp, argument, tensor, 4);
    check_same_device(kOp, argument, tensor, "q", q);
    check_same_dtype(kOp, argument, tensor, "q", q);
    FUSED_CHECK_VALUE(tensor.size(0) == q.size(0), kOp, ": ", argument,
                      " must have the batch of q (", q.size(0), "), got ", tensor.sizes());
  };
  check("k", k);
  check("v", v);
  FUSED_CHECK_VALUE(k.size(3) == q.size(3), kOp, ": k must have the head_dim of q (", q.size(3),
                    "), got ", k.sizes());
  FUSED_CHECK_VALUE(v.size(2) == k.size(2), kOp, ": v must have the length of k (", k.size(2),
                    "), got ", v.sizes());
  FUSED_CHECK_VALUE(v.size(1) == k.size(1), kOp, ": v must have the heads of k (", k.size(1),
                    "), got ", v.sizes());
  const bool grouped = k.size(1) == 0 ? q.size(1) == 0 : q.size(1) % k.size(1) == 0;
  FUSED_CHECK_VALUE(grouped, kOp, ": k must have a number of heads that divides that of q (",
                    q.size(1), "), got ", k.sizes());
}

AttentionMask make_mask(const at::Tensor& mask, const at::Tensor& q, const at::Tensor& k) {
  check_same_device(kOp, "attn_mask", mask, "q", q);
  const bool is_bool = mask.scalar_type() == at::kBool;
  const int64_t shape[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  int64_t strides[] = {0, 0, 0, 0};
  bool broadcasts = mask.dim() <= 4;
  for (int64_t i = 0; broadcasts && i < mask.dim(); ++i) {
    const int64_t dim = 4 - mask.dim() + i;
    broadcasts = mask.size(i) == shape[dim] || mask.size(i) == 1;
    strides[dim] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  FUSED_CHECK_VALUE(broadcasts, kOp, ": attn_mask must be broadcastable to ",
                    at::IntArrayRef(shape), ", got ", mask.sizes());
  return {mask.const_data_ptr(),
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          is_bool ? MaskKind::kBool : MaskKind::kAdditive,
          is_bool ? DType::kFloat32 : dtype_of(kOp, "attn_mask", mask)};
}

void set_dropout(AttentionProblem& problem, double dropout_p,
                 const std::optional<at::Tensor>& maybe_rng, const at::Tensor& q) {
  FUSED_CHECK_VALUE(dropout_p >= 0 && dropout_p <= 1, kOp,
                    ": dropout_p must be between 0 and 1, got ", dropout_p);
  if (dropout_p == 0) return;
  FUSED_CHECK_VALUE(maybe_rng.has_value(), kOp, ": rng must be given with dropout_p > 0, got None");
  const at::Tensor& rng = *maybe_rng;
  FUSED_CHECK_TYPE(rng.scalar_type() == at::kLong, kOp, ": rng must be int64, got ",
                   rng.scalar_type());
  check_shape(kOp, "rng", rng, {2});
  check_same_device(kOp, "rng", rng, "q", q);
  FUSED_CHECK_VALUE(rng.is_contiguous(), kOp, ": rng must be contiguous, got strides ",
                    rng.strides());
  problem.maybe_rng = rng.const_data_ptr<int64_t>();
  problem.drop_threshold = static_cast<uint32_t>(std::min(std::ldexp(dropout_p, 32), 4294967295.0));
  problem.keep_scale = dropout_p == 1 ? 0 : 1 / (1 - dropout_p);
}

// The op's options as they come.
struct Options {
  const std::optional<at::Tensor>&attn_mask, &alibi_slopes, &sink, &rng;
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  double softcap;
  int64_t window_left, window_right;
};

at::ScalarType compute_dtype(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_compute_dtype(const char* argument, const at::Tensor& tensor, const at::Tensor& q) {
  check_same_device(kOp, argument, tensor, "q", q);
  FUSED_CHECK_TYPE(tensor.scalar_type() == compute_dtype(q), kOp, ": ", argument,
                   " must be float32 (float64 for float64), got ", tensor.scalar_type());
}

// A value for each head, or nullptr.
const void* head_values(const char* argument, const std::optional<at::Tensor>& maybe_values,
                        const at::Tensor& q) {
  if (!maybe_values) return nullptr;
  check_shape(kOp, argument, *maybe_values, {q.size(1)});
  check_compute_dtype(argument, *maybe_values, q);
  FUSED_CHECK_VALUE(maybe_values->is_contiguous(), kOp, ": ", argument,
                    " must be contiguous, got strides ", maybe_values->strides());
  return maybe_values->const_data_ptr();
}

// A bound beyond all keys is one that no length can reach.
int32_t window_bound(const char* argument, int64_t bound) {
  FUSED_CHECK_VALUE(bound >= -1, kOp, ": ", argument, " must be at least -1, got ", bound);
  return static_cast<int32_t>(std::min<int64_t>(bound, kMaxLength));
}

// Fills what the forward and the backward pass share. The tensors outlive the params.
void fill_problem(AttentionProblem& problem, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, const Options& options) {
  problem.q = q.const_data_ptr();
  problem.k = k.const_data_ptr();
  problem.v = v.const_data_ptr();
  problem.q_strides = head_strides(q);
  problem.k_strides = head_strides(k);
  problem.v_strides = head_strides(v);
  if (options.attn_mask) problem.mask = make_mask(*options.attn_mask, q, k);
  problem.maybe_alibi_slopes = head_values("alibi_slopes", options.alibi_slopes, q);
  problem.maybe_sink = head_values("sink", options.sink, q);
  problem.batch = checked_int32(kOp, "the batch", q.size(0));
  problem.num_heads = checked_int32(kOp, "the number of heads", q.size(1));
  problem.num_heads_kv = checked_int32(kOp, "the number of key heads", k.size(1));
  problem.seqlen_q = checked_int32(kOp, "the length of q", q.size(2));
  problem.seqlen_k = checked_int32(kOp, "the length of k", k.size(2));
  problem.head_dim = checked_int32(kOp, "head_dim", q.size(3));
  problem.head_dim_v = checked_int32(kOp, "the head_dim of v", v.size(3));
  problem.window_left = window_bound("window_left", options.window_left);
  problem.window_right = window_bound("window_right", options.window_right);
  problem.scale = options.scale ? *options.scale : 1 / std::sqrt(static_cast<double>(q.size(3)));
  FUSED_CHECK_VALUE(options.softcap >= 0 && std::isfinite(options.softcap), kOp,
                    ": softcap must be positive and finite, or 0 for none, got ", options.softcap);
  problem.softcap = options.softcap;
  problem.causal = options.is_causal;
  problem.dtype = dtype_of(kOp, "q", q);
  set_dropout(problem, options.dropout_p, options.rng, q);
  check_supported(kOp, attention_unsupported(problem));
}

// Zeros in the mask's own shape, and where the kernels add up what it gets.
at::Tensor make_mask_gradient(const at::Tensor& mask, const at::Tensor& q,
                              ScoreGradient& gradient) {
  const at::Tensor grad = at::zeros(mask.sizes(), q.options().dtype(compute_dtype(q)));
  if (grad.numel() == 0) return grad;
  int64_t strides[] = {0, 0, 0, 0};
  for (int64_t i = 0; i < grad.dim(); ++i) {
    if (grad.size(i) != 1) strides[4 - grad.dim() + i] = grad.stride(i);
  }
  gradient = {grad.mutable_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
  return grad;
}

at::Tensor not_needed(const at::Tensor& like) { return at::empty({0}, like.options()); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& rng, double dropout_p,
    bool is_causal, std::optional<double> scale, double softcap, int64_t window_left,
    int64_t window_right) {
  check_operands(q_in, k_in, v_in);
  const c10::DeviceGuard guard(q_in.device());
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
                   v = with_contiguous_rows(v_in);
  AttentionForwardParams params{};
  fill_problem(params, q, k, v,
               {attn_mask, alibi_slopes, sink, rng, dropout_p, is_causal, scale, softcap,
                window_left, window_right});

  at::Tensor out = empty_heads(q, q.size(0), q.size(1), q.size(2), v.size(3));
  at::Tensor lse =
      at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(compute_dtype(q)));
  at::Tensor row_stats = at::empty({2, q.size(0), q.size(1), q.size(2)}, lse.options());
  if (lse.numel() == 0) return {out, lse, row_stats};
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr();
  params.row_stats = row_stats.mutable_data_ptr();
  params.out_strides = head_strides(out);
  check_status(kOp, FUSED_DISPATCH(q, attention_forward, params));
  return {out, lse, row_stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_backward(const at::Tensor& grad_out_in, const std::optional<at::Tensor>& grad_lse_in,
                   const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                   const at::Tensor& out_in, const at::Tensor& row_stats_in,
                   const std::optional<at::Tensor>& attn_mask,
                   const std::optional<at::Tensor>& alibi_slopes,
                   const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& rng,
                   double dropout_p, bool is_causal, std::optional<double> scale, double softcap,
                   int64_t window_left, int64_t window_right, std::array<bool, 6> needs) {
  check_operands(q_in, k_in, v_in);
  const c10::DeviceGuard guard(q_in.device());
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
                   v = with_contiguous_rows(v_in);
  AttentionBackwardParams params{};
  fill_problem(params, q, k, v,
               {attn_mask, alibi_slopes, sink, rng, dropout_p, is_causal, scale, softcap,
                window_left, window_right});

  const int64_t stats_shape[] = {2, q.size(0), q.size(1), q.size(2)};
  const int64_t out_shape[] = {q.size(0), q.size(1), q.size(2), v.size(3)};
  const auto check_like_out = [&](const char* argument, const at::Tensor& tensor) {
    check_shape(kOp, argument, tensor, out_shape);
    check_same_dtype(kOp, argument, tensor, "q", q);
    check_same_device(kOp, argument, tensor, "q", q);
  };
  check_like_out("grad_out", grad_out_in);
  check_like_out("out", out_in);
  check_shape(kOp, "row_stats", row_stats_in, stats_shape);
  check_compute_dtype("row_stats", row_stats_in, q);
  if (grad_lse_in) {
    check_shape(kOp, "grad_lse", *grad_lse_in, at::IntArrayRef(out_shape, 3));
    check_compute_dtype("grad_lse", *grad_lse_in, q);
  }
  const bool needs_mask = needs[3] && params.mask.kind == MaskKind::kAdditive;
  const bool needs_slopes = needs[4] && alibi_slopes, needs_sink = needs[5] && sink;
  const at::Tensor grad_out = with_contiguous_rows(grad_out_in), out = with_contiguous_rows(out_in);
  const at::Tensor row_stats = row_stats_in.contiguous();
  const at::Tensor grad_lse = grad_lse_in ? grad_lse_in->contiguous() : at::Tensor();
  const at::Tensor delta = at::empty({q.size(0), q.size(1), q.size(2)}, row_stats.options());
  const at::Tensor row_alibi = needs_slopes ? at::empty_like(delta) : at::Tensor();

  const auto gradient_of = [](const at::Tensor& x, bool needed) {
    return needed ? empty_heads(x, x.size(0), x.size(1), x.size(2), x.size(3)) : not_needed(x);
  };
  const bool needs_kv = needs[1] || needs[2];  // one pass gives both
  at::Tensor grad_q = gradient_of(q, needs[0]);
  at::Tensor grad_k = gradient_of(k, needs_kv), grad_v = gradient_of(v, needs_kv);
  at::Tensor grad_mask =
      needs_mask ? make_mask_gradient(*attn_mask, q, params.maybe_grad_mask) : not_needed(delta);
  at::Tensor grad_slopes =
      needs_slopes ? at::zeros(alibi_slopes->sizes(), alibi_slopes->options()) : not_needed(delta);
  at::Tensor grad_sink = needs_sink ? at::zeros(sink->sizes(), sink->options()) : not_needed(delta);
  if (delta.numel() > 0) {
    params.out = out.const_data_ptr();
    params.grad_out = grad_out.const_data_ptr();
    params.row_stats = row_stats.const_data_ptr();
    params.maybe_grad_lse = grad_lse.defined() ? grad_lse.const_data_ptr() : nullptr;
    params.delta = delta.mutable_data_ptr();
    params.out_strides = head_strides(out);
    params.grad_out_strides = head_strides(grad_out);
    if (needs[0]) {
      params.maybe_grad_q = grad_q.mutable_data_ptr();
      params.grad_q_strides = head_strides(grad_q);
    }
    if (needs_kv) {
      params.maybe_grad_k = grad_k.mutable_data_ptr();
      params.maybe_grad_v = grad_v.mutable_data_ptr();
      params.grad_k_strides = head_strides(grad_k);
      params.grad_v_strides = head_strides(grad_v);
    }
    if (needs_slopes) {
      params.maybe_row_alibi = row_alibi.mutable_data_ptr();
      params.maybe_grad_alibi_slopes = grad_slopes.mutable_data_ptr();
    }
    if (needs_sink) params.maybe_grad_sink = grad_sink.mutable_data_ptr();
    check_status(kOp, FUSED_DISPATCH(q, attention_backward, params));
  } else if (needs_kv) {
    grad_k.zero_();
    grad_v.zero_();
  }
  if (needs_mask) grad_mask = grad_mask.to(attn_mask->scalar_type());
  return {grad_q, grad_k, grad_v, grad_mask, grad_slopes, grad_sink};
}

}  // namespace fused
