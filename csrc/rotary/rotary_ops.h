// The rotary function that Python and torch.library bind. Checked, allocating, differentiable by
// what wraps it.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "common/status.h"

namespace fused {

// q [B, H, S, D] and k [B, G, S, D] of any strides, cos and sin [S, R] or [B, S, R] of any floating
// dtype; what it means is in rotary.h. Returns both turned, laid out as [B, S, heads, D].
FUSED_API std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& q, const at::Tensor& k,
                                                    const at::Tensor& cos, const at::Tensor& sin,
                                                    bool interleaved, bool inverse);

}  // namespace fused
