// The glue of attention's two passes: checks, pads, allocates, fills the params, picks the backend.
#include "attention/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "attention/attention_glue.h"
#include "attention/attention_ops.h"
#include "attention/attention_score_parts.h"
#include "common/dispatch.h"

namespace fused {

using namespace attention_glue;

namespace {

// Zeros in the mask's own shape, and where the kernels add up what it gets.
at::Tensor make_mask_gradient(const at::Tensor& mask, const at::Tensor& q,
                              ScoreGradient& gradient) {
  const at::Tensor grad = at::zeros(mask.sizes(), q.options().dtype(compute_dtype(q)));
  if (grad.numel() == 0) return grad;
  int64_t strides[] = {0, 0, 0, 0};
  for (int64_t i = 0; i < grad.dim(); ++i) {
    if (grad.size(i) != 1) strides[4 - grad.dim() + i] = grad.stride(i);
  }
  gradient = {grad.mutable_data_ptr(), strides[0], strides[1], strides[2], strides[3], nullptr};
  return grad;
}

at::Tensor not_needed(const at::Tensor& like) { return at::empty({0}, like.options()); }

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& rng,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
    double dropout_p, bool is_causal, std::optional<double> scale, double softcap,
    int64_t window_left, int64_t window_right) {
  check_operands(q_in, k_in, v_in, cu_seqlens_q.has_value());
  const c10::DeviceGuard guard(q_in.device());
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
                   v = with_contiguous_rows(v_in);
  AttentionForwardParams params{};
  fill_problem(params, q, k, v,
               {attn_mask, alibi_slopes, sink, rng, cu_seqlens_q, cu_seqlens_k, dropout_p,
                is_causal, scale, softcap, window_left, window_right});
  const int64_t multiple = FUSED_DISPATCH(q, attention_pad_multiple, params);
  if (multiple > 1) {
    const auto [out, lse, row_stats] = attention_forward(
        padded_rows(q, multiple), padded_rows(k, multiple), padded_rows(v, multiple), attn_mask,
        alibi_slopes, sink, rng, cu_seqlens_q, cu_seqlens_k, dropout_p, is_causal,
        params.scale.in_double, softcap, window_left, window_right);
    return {unpadded_rows(out, v.size(-1)), lse, row_stats};
  }
  const Results results = make_results(params, q, v.size(-1));
  if (results.lse.numel() > 0) check_status(kOp, FUSED_DISPATCH(q, attention_forward, params));
  return {results.out, results.lse, results.row_stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_backward(const at::Tensor& grad_out_in, const std::optional<at::Tensor>& grad_lse_in,
                   const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                   const at::Tensor& out_in, const at::Tensor& row_stats_in,
                   const std::optional<at::Tensor>& attn_mask,
                   const std::optional<at::Tensor>& alibi_slopes,
                   const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& rng,
                   const std::optional<at::Tensor>& cu_seqlens_q,
                   const std::optional<at::Tensor>& cu_seqlens_k, double dropout_p, bool is_causal,
                   std::optional<double> scale, double softcap, int64_t window_left,
                   int64_t window_right, std::array<bool, 6> needs) {
  check_operands(q_in, k_in, v_in, cu_seqlens_q.has_value());
  const c10::DeviceGuard guard(q_in.device());
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
                   v = with_contiguous_rows(v_in);
  AttentionBackwardParams params{};
  fill_problem(params, q, k, v,
               {attn_mask, alibi_slopes, sink, rng, cu_seqlens_q, cu_seqlens_k, dropout_p,
                is_causal, scale, softcap, window_left, window_right});

  std::vector<int64_t> out_shape = q.sizes().vec();
  out_shape.back() = v.size(-1);
  const auto check_like_out = [&](const char* argument, const at::Tensor& tensor) {
    check_shape(kOp, argument, tensor, out_shape);
    check_same_dtype(kOp, argument, tensor, "q", q);
    check_same_device(kOp, argument, tensor, "q", q);
  };
  check_like_out("grad_out", grad_out_in);
  check_like_out("out", out_in);
  check_shape(kOp, "row_stats", row_stats_in, rows_shape(q, 2));
  check_compute_dtype("row_stats", row_stats_in, q);
  if (grad_lse_in) {
    check_shape(kOp, "grad_lse", *grad_lse_in, rows_shape(q));
    check_compute_dtype("grad_lse", *grad_lse_in, q);
  }
  const int64_t multiple = FUSED_DISPATCH(q, attention_pad_multiple, params);
  if (multiple > 1) {
    auto grads = attention_backward(
        padded_rows(grad_out_in, multiple), grad_lse_in, padded_rows(q, multiple),
        padded_rows(k, multiple), padded_rows(v, multiple), padded_rows(out_in, multiple),
        row_stats_in, attn_mask, alibi_slopes, sink, rng, cu_seqlens_q, cu_seqlens_k, dropout_p,
        is_causal, params.scale.in_double, softcap, window_left, window_right, needs);
    std::get<0>(grads) = unpadded_rows(std::get<0>(grads), q.size(-1));
    std::get<1>(grads) = unpadded_rows(std::get<1>(grads), k.size(-1));
    std::get<2>(grads) = unpadded_rows(std::get<2>(grads), v.size(-1));
    return grads;
  }
  const bool needs_mask = needs[3] && params.mask.kind == MaskKind::kAdditive;
  const bool needs_slopes = needs[4] && alibi_slopes, needs_sink = needs[5] && sink;
  const at::Tensor grad_out = with_contiguous_rows(grad_out_in), out = with_contiguous_rows(out_in);
  const at::Tensor row_stats = row_stats_in.contiguous();
  const at::Tensor grad_lse = grad_lse_in ? grad_lse_in->contiguous() : at::Tensor();
  const at::Tensor delta = at::empty(rows_shape(q), row_stats.options());
  const at::Tensor row_alibi = needs_slopes ? at::empty_like(delta) : at::Tensor();
  at::Tensor mask_partials;

  const auto gradient_of = [](const at::Tensor& x, bool needed) {
    return needed ? empty_heads(x, x.size(-1)) : not_needed(x);
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
    ScoreGradient& of_mask = params.maybe_grad_mask;
    const int64_t partials = of_mask.data != nullptr ? score_partials(params, of_mask) : 0;
    if (partials > 0 && runs_on_cuda(q)) {
      mask_partials = at::empty({partials}, delta.options());
      of_mask.maybe_partials = mask_partials.mutable_data_ptr();
    }
    check_status(kOp, FUSED_DISPATCH(q, attention_backward, params));
  } else if (needs_kv) {
    grad_k.zero_();
    grad_v.zero_();
  }
  if (needs_mask) grad_mask = grad_mask.to(attn_mask->scalar_type());
  return {grad_q, grad_k, grad_v, grad_mask, grad_slopes, grad_sink};
}

}  // namespace fused
