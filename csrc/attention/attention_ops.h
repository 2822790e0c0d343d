// The attention functions that Python and torch.library bind. Checked, allocating, differentiable
// by what wraps them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/status.h"

namespace fused {

// q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv]; what the options mean is in attention.h:
// attn_mask bool or floating, broadcastable to [B, H, S, T]; alibi_slopes and sink [H], float32
// (float64 for float64); rng int64 [2] (seed, offset) where dropout_p > 0; softcap 0 for none;
// window_left and window_right -1 for no bound. With int32 cu_seqlens_q and cu_seqlens_k [B + 1]
// the operands are packed: q [S, H, D], k [T, G, D], v [T, G, Dv], out [S, H, Dv], lse [H, S],
// row_stats [2, H, S]. Returns out [B, H, S, Dv] (laid out as [B, S, H, Dv]), lse [B, H, S] and,
// for the backward pass, row_stats [2, B, H, S].
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& rng,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
    double dropout_p, bool is_causal, std::optional<double> scale, double softcap,
    int64_t window_left, int64_t window_right);

// attention_forward and, in the same pass, the tangents of its results for those of its inputs:
// each like what it is the tangent of, or zero where there is none. Returns out, lse, row_stats,
// out_tangent, laid out as out, and lse_tangent.
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_tangent(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& rng,
    const std::optional<at::Tensor>& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k,
    double dropout_p, bool is_causal, std::optional<double> scale, double softcap,
    int64_t window_left, int64_t window_right, const std::optional<at::Tensor>& q_tangent,
    const std::optional<at::Tensor>& k_tangent, const std::optional<at::Tensor>& v_tangent,
    const std::optional<at::Tensor>& attn_mask_tangent,
    const std::optional<at::Tensor>& alibi_slopes_tangent,
    const std::optional<at::Tensor>& sink_tangent);

// Returns the gradients of q, k and v, each laid out as [B, length, heads, D], and of attn_mask,
// alibi_slopes and sink. `needs` says which are wanted; the others come back without elements.
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_backward(const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse,
                   const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& out, const at::Tensor& row_stats,
                   const std::optional<at::Tensor>& attn_mask,
                   const std::optional<at::Tensor>& alibi_slopes,
                   const std::optional<at::Tensor>& sink, const std::optional<at::Tensor>& rng,
                   const std::optional<at::Tensor>& cu_seqlens_q,
                   const std::optional<at::Tensor>& cu_seqlens_k, double dropout_p, bool is_causal,
                   std::optional<double> scale, double softcap, int64_t window_left,
                   int64_t window_right, std::array<bool, 6> needs);

// Attention of q [B, H, S, D] over a cache k_cache [B, G, C, D], v_cache [B, G, C, Dv], or pages
// [num_pages, G, page_size, D] with int32 block_table [B, pages], of which sequence b has
// cache_seqlens[b] (int32 [B]) keys. New k and v, where given, are written behind them first and
// count. Returns out and lse as attention_forward does.
FUSED_API std::tuple<at::Tensor, at::Tensor> attention_with_kv_cache(
    const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& cache_seqlens, const std::optional<at::Tensor>& k,
    const std::optional<at::Tensor>& v, const std::optional<at::Tensor>& block_table,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sink, bool is_causal, std::optional<double> scale,
    double softcap, int64_t window_left, int64_t window_right);

}  // namespace fused
