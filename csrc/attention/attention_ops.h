// The attention functions that Python and torch.library bind. Checked, allocating, differentiable
// by what wraps them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "common/status.h"

namespace fused {

// q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv], attn_mask bool or floating, broadcastable to
// [B, H, S, T], rng int64 [2] (seed, offset) where dropout_p > 0.
// Returns out [B, H, S, Dv] (laid out as [B, S, H, Dv]) and lse [B, H, S].
FUSED_API std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& rng,
    double dropout_p, bool is_causal, std::optional<double> scale);

// Returns the gradients of q, k and v, each laid out as [B, length, heads, D].
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& rng,
    double dropout_p, bool is_causal, std::optional<double> scale);

}  // namespace fused
