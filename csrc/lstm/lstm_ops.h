// The LSTM ops as the bindings see them: tensors in, tensors out.
//
// Letters: B = batch, T = time steps, N = rows of all steps (T B, or the sum of batch_sizes), I =
// input size, H = hidden size, P = size of h (H, or the projection's), D = a layer's input size.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/status.h"

namespace fused {

// -> h_next [B, H], c_next [B, H], gates [B, 4H] (activated, for the backward pass)
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_forward(
    const at::Tensor& input, const at::Tensor& h, const at::Tensor& c, const at::Tensor& w_ih,
    const at::Tensor& w_hh, const std::optional<at::Tensor>& b_ih,
    const std::optional<at::Tensor>& b_hh);

// -> grad_input, grad_h, grad_c, grad_w_ih, grad_w_hh, grad_bias (of either bias).
// `needs` says which are wanted; the others come back without elements.
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
lstm_cell_backward(const std::optional<at::Tensor>& grad_h_next,
                   const std::optional<at::Tensor>& grad_c_next, const at::Tensor& input,
                   const at::Tensor& h, const at::Tensor& c, const at::Tensor& w_ih,
                   const at::Tensor& w_hh, const at::Tensor& gates, std::array<bool, 6> needs);

// One layer in one direction over all time steps. input is [T, B, D], or [N, D] with batch_sizes
// [T] (int64, on the CPU, falling) as in a PackedSequence. w_hr [P, H] projects h.
// -> output [.., P], h_n [B, P], c_n [B, H], and for the backward pass gates [N, 4H],
//    cells [N, H], hidden [N, H] (h before the projection; without elements if there is none)
FUSED_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
lstm_layer_forward(const at::Tensor& input, const at::Tensor& h0, const at::Tensor& c0,
                   const at::Tensor& w_ih, const at::Tensor& w_hh,
                   const std::optional<at::Tensor>& b_ih, const std::optional<at::Tensor>& b_hh,
                   const std::optional<at::Tensor>& w_hr,
                   const std::optional<at::Tensor>& batch_sizes, bool reverse);

// -> grad_input, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_bias (of either bias), grad_w_hr.
// `needs` says which are wanted; the others come back without elements.
FUSED_API
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
lstm_layer_backward(const std::optional<at::Tensor>& grad_output,
                    const std::optional<at::Tensor>& grad_h_n,
                    const std::optional<at::Tensor>& grad_c_n, const at::Tensor& input,
                    const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_ih,
                    const at::Tensor& w_hh, const std::optional<at::Tensor>& w_hr,
                    const std::optional<at::Tensor>& batch_sizes, bool reverse,
                    const at::Tensor& output, const at::Tensor& gates, const at::Tensor& cells,
                    const at::Tensor& hidden, std::array<bool, 7> needs);

}  // namespace fused
