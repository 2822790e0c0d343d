// What the LSTM kernels read and write, and what launches them.
//
// The kernels hold the pointwise part of a step: the four gates, the cell and the hidden update.
// The matrix products around them are the library's or lstm_product.h's (see lstm_layer.cpp).
//
//   i, f, o = sigmoid(gates), g = tanh(gates)     gates = x W_ih' + h W_hh' + b_ih + b_hh
//   c_next  = f c + i g
//   h_next  = o tanh(c_next)
//
// B = batch (the rows of this step), H = hidden size. Gates lie as [B, 4H] in the order i, f, g, o.
// Every buffer is contiguous and of `dtype`; arithmetic is in float (in double for float64).
// NaN and infinities go through the formulas as they stand.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/status.h"

namespace fused {

struct LstmCellForwardParams {
  void* gates;                // [B, 4H]: the products' sum, replaced by the activated gates
  const void* maybe_bias_ih;  // [4H]
  const void* maybe_bias_hh;  // [4H]
  const void* c_prev;         // [B, H]
  void* c_next;               // [B, H], may be c_prev
  void* h_next;               // [B, H]
  void* maybe_c_copy;         // [B, H]: c_next again, for the backward pass
  void* maybe_h_copy;         // [B, H]: h_next again, in a layer's output
  int32_t batch, hidden_size;
  DType dtype;
};
static_assert(std::is_trivially_copyable_v<LstmCellForwardParams>);

// With dh and dc the gradients of h_next and c_next, the latter already including dh o
// tanh'(c_next):
//   grad_gates  = (dc g i', dc c_prev f', dc i g', dh tanh(c_next) o')
//   grad_c_prev = dc f
// c_next is computed again: what the forward pass returned may have been written to since.
struct LstmCellBackwardParams {
  const void* gates;              // [B, 4H]: as the forward pass left them
  const void* c_prev;             // [B, H]
  const void* maybe_grad_h;       // [B, H]: from the step after this one
  const void* maybe_grad_output;  // [B, H]: from the layer's output, added to grad_h
  const void* maybe_grad_c;       // [B, H]
  void* grad_gates;               // [B, 4H]: gradient of the products' sum
  void* grad_c_prev;              // [B, H], may be grad_c
  int32_t batch, hidden_size;
  DType dtype;
};
static_assert(std::is_trivially_copyable_v<LstmCellBackwardParams>);

Status lstm_cell_forward_cpu(const LstmCellForwardParams& params);
Status lstm_cell_backward_cpu(const LstmCellBackwardParams& params);
Status lstm_cell_forward_cuda(const LstmCellForwardParams& params, Stream stream);
Status lstm_cell_backward_cuda(const LstmCellBackwardParams& params, Stream stream);

}  // namespace fused
