// The convolution functions that Python and torch.library bind. Checked, allocating, differentiable
// by what wraps them. One, two or three axes of space, as many as `stride` has elements.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "common/status.h"

namespace fused {

// input [N, C, space], weight [K, C / G, kernel], bias [K]; `padding` has what goes before each
// axis, then what goes after each. Returns the output [N, K, out space], channels-last where input
// or weight is, and what the activation was applied to if save_pre, else an empty tensor.
FUSED_API std::tuple<at::Tensor, at::Tensor> conv_forward(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    std::optional<std::string_view> activation, bool save_pre);

// `saved` is the output of relu, leaky_relu, sigmoid and tanh, what went into gelu and silu.
// Returns the gradients of input, weight and bias, an empty tensor for each that is not wanted.
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const std::optional<at::Tensor>& saved, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::optional<std::string_view> activation,
    bool want_input, bool want_weight, bool want_bias);

}  // namespace fused
