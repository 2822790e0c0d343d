// Glue of the LSTM cell: two library products, one kernel; backward one kernel, up to four
// products.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "lstm/lstm_glue.h"
#include "lstm/lstm_ops.h"

namespace fused {

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_forward(
    const at::Tensor& input, const at::Tensor& h, const at::Tensor& c, const at::Tensor& w_ih,
    const at::Tensor& w_hh, const std::optional<at::Tensor>& b_ih,
    const std::optional<at::Tensor>& b_hh) {
  constexpr const char* op = "lstm_cell";
  check_dim(op, "input", input, 2);
  check_lstm_arguments(op, input, h, c, {w_ih, w_hh, b_ih, b_hh, std::nullopt});
  check_same_batch(op, input, h);
  const PlainProducts plain_products;
  const c10::DeviceGuard device_guard(input.device());

  at::Tensor gates = at::mm(input, w_ih.t());
  gates.addmm_(h, w_hh.t());
  const at::Tensor c_prev = c.contiguous();
  const at::Tensor bias_ih = contiguous_or_undefined(b_ih);
  const at::Tensor bias_hh = contiguous_or_undefined(b_hh);
  at::Tensor c_next = at::empty(c.sizes(), c.options());
  at::Tensor h_next = at::empty(c.sizes(), c.options());
  LstmCellForwardParams p{};
  p.gates = gates.data_ptr();
  p.maybe_bias_ih = pointer_or_null(bias_ih);
  p.maybe_bias_hh = pointer_or_null(bias_hh);
  p.c_prev = c_prev.const_data_ptr();
  p.c_next = c_next.data_ptr();
  p.h_next = h_next.data_ptr();
  p.batch = static_cast<int32_t>(c.size(0));
  p.hidden_size = static_cast<int32_t>(c.size(1));
  p.dtype = dtype_of(op, "input", input);
  check_status(op, FUSED_DISPATCH(input, lstm_cell_forward, p));
  return {h_next, c_next, gates};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
lstm_cell_backward(const std::optional<at::Tensor>& grad_h_next,
                   const std::optional<at::Tensor>& grad_c_next, const at::Tensor& input,
                   const at::Tensor& h, const at::Tensor& c, const at::Tensor& w_ih,
                   const at::Tensor& w_hh, const at::Tensor& gates, std::array<bool, 6> needs) {
  constexpr const char* op = "lstm_cell_backward";
  check_dim(op, "input", input, 2);
  check_lstm_arguments(op, input, h, c, {w_ih, w_hh, std::nullopt, std::nullopt, std::nullopt});
  check_same_batch(op, input, h);
  check_like_input(op, "gates", gates, input, {c.size(0), 4 * c.size(1)});
  for (const auto& [name, grad] :
       {std::pair("grad_h_next", &grad_h_next), std::pair("grad_c_next", &grad_c_next)}) {
    if (has(*grad)) check_like_input(op, name, **grad, input, c.sizes());
  }
  const PlainProducts plain_products;
  const c10::DeviceGuard device_guard(input.device());

  const at::Tensor c_prev = c.contiguous(), activated = gates.contiguous();
  const at::Tensor grad_h = contiguous_or_undefined(grad_h_next);
  const at::Tensor grad_c = contiguous_or_undefined(grad_c_next);
  at::Tensor grad_gates = at::empty(activated.sizes(), activated.options());
  at::Tensor grad_c_prev = at::empty(c_prev.sizes(), c_prev.options());
  LstmCellBackwardParams p{};
  p.gates = activated.const_data_ptr();
  p.c_prev = c_prev.const_data_ptr();
  p.maybe_grad_h = pointer_or_null(grad_h);
  p.maybe_grad_c = pointer_or_null(grad_c);
  p.grad_gates = grad_gates.data_ptr();
  p.grad_c_prev = grad_c_prev.data_ptr();
  p.batch = static_cast<int32_t>(c.size(0));
  p.hidden_size = static_cast<int32_t>(c.size(1));
  p.dtype = dtype_of(op, "input", input);
  check_status(op, FUSED_DISPATCH(input, lstm_cell_backward, p));

  return {needs[0] ? at::mm(grad_gates, w_ih) : not_needed(input),
          needs[1] ? at::mm(grad_gates, w_hh) : not_needed(input),
          needs[2] ? grad_c_prev : not_needed(input),
          needs[3] ? at::mm(grad_gates.t(), input) : not_needed(input),
          needs[4] ? at::mm(grad_gates.t(), h) : not_needed(input),
          needs[5] ? at::sum(grad_gates, 0) : not_needed(input)};
}

}  // namespace fused
