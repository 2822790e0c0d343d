// Glue of an LSTM layer: the input products of all steps as one matrix product, then per step the
// recurrent product and one kernel; backward the same in reverse, then one product per weight.
//
// h and c are carried in buffers [B, .] that each step updates in place for its own rows. So rows
// of sequences that have ended keep their last state, rows of sequences that have yet to join keep
// the initial one, and at the end the buffers are h_n and c_n (backward: the gradients of h0, c0).
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "common/parallel.h"
#include "lstm/lstm_factor.h"
#include "lstm/lstm_glue.h"
#include "lstm/lstm_ops.h"
#include "lstm/lstm_steps.h"

namespace fused {
namespace {

at::Tensor fresh(const at::Tensor& maybe_initial, const at::Tensor& like) {
  return maybe_initial.defined() ? maybe_initial.clone(at::MemoryFormat::Contiguous)
                                 : at::zeros(like.sizes(), like.options());
}

// The state that each row started from, [N, .]: `initial` before a sequence's first step, else what
// `states` holds for its step before.
at::Tensor states_before(const at::Tensor& states, const at::Tensor& initial,
                         const std::vector<LstmStep>& steps, bool reverse) {
  struct Range {
    const at::Tensor* source;
    int64_t begin, rows;
  };
  std::vector<Range> ranges;  // neighbours merged: a padded batch comes to two
  const auto append = [&](const at::Tensor& source, int64_t begin, int64_t rows) {
    if (rows == 0) return;
    const bool adjoins = !ranges.empty() && ranges.back().source == &source &&
                         ranges.back().begin + ranges.back().rows == begin;
    if (adjoins) {
      ranges.back().rows += rows;
    } else {
      ranges.push_back({&source, begin, rows});
    }
  };
  for (size_t k = 0; k < steps.size(); ++k) {
    const LstmStep& step = reverse ? steps[steps.size() - 1 - k] : steps[k];
    append(states, step.previous, step.continued);
    append(initial, step.continued, step.rows - step.continued);
  }
  std::vector<at::Tensor> parts;
  for (const Range& r : ranges) parts.push_back(r.source->narrow(0, r.begin, r.rows));
  return parts.empty() ? initial.narrow(0, 0, 0) : at::cat(parts);
}

std::optional<Factor> factor_if(const std::optional<at::Tensor>& maybe_weight, int64_t rows,
                                int64_t products) {
  return has(maybe_weight) ? std::optional<Factor>(std::in_place, *maybe_weight, rows, products)
                           : std::nullopt;
}

void check_layer(const char* op, const at::Tensor& input, const at::Tensor& h0,
                 const at::Tensor& c0, const LstmWeights& weights, bool packed) {
  check_dim(op, "input", input, packed ? 2 : 3);
  check_lstm_arguments(op, input, h0, c0, weights);
  FUSED_CHECK_VALUE(packed || input.size(1) == h0.size(0), op, ": h must have the batch of input (",
                    input.size(packed ? 0 : 1), "), got ", h0.sizes());
}

// Goes through all steps by `run(first, last)` for rows [first, last) of the batch: all of them, or
// on the CPU each thread its own from the first step to the last. Threads then need not wait for
// each other in every step; but each reads the recurrent weights, which pays as long as a core's
// cache holds them. (On two cores 64 steps of 8 x 256 take 2.4 ms instead of 3.9, of 32 x 256 8.6
// instead of 9.2; 32 steps of 8 x 512, with 4 MB of weights, 7.7 instead of 6.4.)
template <typename Run>
void for_rows_of_batch(const std::vector<LstmStep>& steps, int64_t batch, const Factor& recurrent,
                       bool has_projection, const Run& run) {
  constexpr int64_t kTileRows = 4;  // of a product: fewer cost as much
  constexpr int64_t kCachedBytes = 1 << 20;
  const int64_t bytes = recurrent.packed_bytes();
  const bool side_by_side = 0 < bytes && bytes <= kCachedBytes && !has_projection;
  const int64_t parts = side_by_side ? std::min<int64_t>(num_threads(), batch / kTileRows) : 1;
  if (parts <= 1) return run(0, batch);
  const std::vector<int64_t> bounds = split_batch(steps, batch, parts);
  parallel_for(0, static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run(bounds[part], bounds[part + 1]);
  });
}

std::vector<int64_t> with_last(const at::Tensor& input, int64_t last) {
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// What the forward pass saved.
void check_saved(const char* op, const at::Tensor& input, const at::Tensor& h0,
                 const at::Tensor& c0, const at::Tensor& output, const at::Tensor& gates,
                 const at::Tensor& cells) {
  const int64_t hidden_size = c0.size(1);
  const int64_t rows = input.dim() == 2 ? input.size(0) : input.size(0) * input.size(1);
  check_like_input(op, "output", output, input, with_last(input, h0.size(1)));
  check_like_input(op, "gates", gates, input, {rows, 4 * hidden_size});
  check_like_input(op, "cells", cells, input, {rows, hidden_size});
}

// [T, B, D] or [N, D] -> [N, D], contiguous.
at::Tensor as_rows(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return dense.dim() == 2 ? dense : dense.view({dense.size(0) * dense.size(1), dense.size(2)});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
lstm_layer_forward(const at::Tensor& input, const at::Tensor& h0, const at::Tensor& c0,
                   const at::Tensor& w_ih, const at::Tensor& w_hh,
                   const std::optional<at::Tensor>& b_ih, const std::optional<at::Tensor>& b_hh,
                   const std::optional<at::Tensor>& w_hr,
                   const std::optional<at::Tensor>& batch_sizes, bool reverse) {
  constexpr const char* op = "lstm";
  check_layer(op, input, h0, c0, {w_ih, w_hh, b_ih, b_hh, w_hr}, has(batch_sizes));
  const std::vector<LstmStep> steps = lstm_steps(op, input, h0.size(0), batch_sizes, reverse);
  const PlainProducts plain_products;
  const c10::DeviceGuard device_guard(input.device());

  const int64_t state_size = h0.size(1), hidden_size = c0.size(1);
  const at::Tensor rows = as_rows(input);
  const at::Tensor gates = product(rows, w_ih.t());
  const at::Tensor h = fresh(h0, h0), c = fresh(c0, c0);
  const at::Tensor output = at::empty({rows.size(0), state_size}, input.options());
  const at::Tensor cells = at::empty({rows.size(0), hidden_size}, input.options());
  const at::Tensor hidden =
      at::empty({has(w_hr) ? rows.size(0) : 0, has(w_hr) ? hidden_size : 0}, input.options());
  const at::Tensor bias_ih = contiguous_or_undefined(b_ih);
  const at::Tensor bias_hh = contiguous_or_undefined(b_hh);

  LstmCellForwardParams shared{};
  shared.maybe_bias_ih = pointer_or_null(bias_ih);
  shared.maybe_bias_hh = pointer_or_null(bias_hh);
  shared.hidden_size = static_cast<int32_t>(hidden_size);
  shared.dtype = dtype_of(op, "input", input);
  const auto num_steps = static_cast<int64_t>(steps.size());
  const Factor recurrent(w_hh.t(), rows.size(0), num_steps);
  const auto projection =
      factor_if(has(w_hr) ? std::optional(w_hr->t()) : std::nullopt, rows.size(0), num_steps);
  const auto run = [&](int64_t first, int64_t last) {
    LstmCellForwardParams p = shared;
    p.c_prev = const_row_pointer(c, first);
    p.c_next = row_pointer(c, first);
    for (const LstmStep& step : steps) {
      const int64_t begin = step.begin + first, rows = std::min(last, step.rows) - first;
      if (rows <= 0) continue;
      recurrent.add({gates, begin, rows}, {h, first, rows});
      p.batch = static_cast<int32_t>(rows);
      p.gates = row_pointer(gates, begin);
      p.maybe_c_copy = row_pointer(cells, begin);
      p.h_next = has(w_hr) ? row_pointer(hidden, begin) : row_pointer(h, first);
      p.maybe_h_copy = has(w_hr) ? nullptr : row_pointer(output, begin);
      check_status(op, FUSED_DISPATCH(input, lstm_cell_forward, p));
      if (has(w_hr)) {
        projection->assign({output, begin, rows}, {hidden, begin, rows});
        h.narrow(0, first, rows).copy_(output.narrow(0, begin, rows));
      }
    }
  };
  for_rows_of_batch(steps, h0.size(0), recurrent, has(w_hr), run);
  return {output.view(with_last(input, state_size)), h, c, gates, cells, hidden};
}

namespace {

struct StepGradients {
  at::Tensor h, c;       // [B, P], [B, H]: in as gradients of h_n and c_n, out of h0 and c0
  at::Tensor gates;      // [N, 4H]: of the products' sum
  at::Tensor projected;  // [N, P]: of h after the projection; undefined without one
};

// The steps of the backward pass. `grad_output` is [N, P] or undefined.
void backward_steps(const char* op, const std::vector<LstmStep>& steps,
                    const at::Tensor& grad_output, const at::Tensor& c0, const at::Tensor& w_hh,
                    const std::optional<at::Tensor>& w_hr, const at::Tensor& gates,
                    const at::Tensor& cells, StepGradients& grad) {
  const at::Tensor grad_hidden =
      has(w_hr) ? at::empty(grad.c.sizes(), grad.c.options()) : at::Tensor();
  const auto num_steps = static_cast<int64_t>(steps.size());
  const Factor recurrent(w_hh, gates.size(0), num_steps);
  const auto projection = factor_if(w_hr, gates.size(0), num_steps);
  const auto run = [&](int64_t first, int64_t last) {
    LstmCellBackwardParams p{};
    p.hidden_size = static_cast<int32_t>(c0.size(1));
    p.dtype = dtype_of(op, "input", gates);
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      const int64_t begin = step->begin + first, rows = std::min(last, step->rows) - first;
      if (rows <= 0) continue;
      if (has(w_hr)) {
        at::Tensor projected = grad.projected.narrow(0, begin, rows);
        projected.copy_(grad.h.narrow(0, first, rows));
        if (grad_output.defined()) projected.add_(grad_output.narrow(0, begin, rows));
        projection->assign({grad_hidden, first, rows}, {grad.projected, begin, rows});
      }
      // Rows that continue a sequence and rows that begin one had their c_prev in different
      // buffers.
      const auto launch = [&](int64_t from, int64_t to, const void* c_prev) {
        if (from >= to) return;
        p.batch = static_cast<int32_t>(to - from);
        p.gates = const_row_pointer(gates, step->begin + from);
        p.c_prev = c_prev;
        p.maybe_grad_h = const_row_pointer(has(w_hr) ? grad_hidden : grad.h, from);
        p.maybe_grad_output = has(w_hr) || !grad_output.defined()
                                  ? nullptr
                                  : const_row_pointer(grad_output, step->begin + from);
        p.maybe_grad_c = const_row_pointer(grad.c, from);
        p.grad_c_prev = row_pointer(grad.c, from);
        p.grad_gates = row_pointer(grad.gates, step->begin + from);
        check_status(op, FUSED_DISPATCH(gates, lstm_cell_backward, p));
      };
      const int64_t end = first + rows, joined = std::max(first, step->continued);
      launch(first, std::min(end, step->continued),
             const_row_pointer(cells, step->previous + first));
      launch(joined, end, const_row_pointer(c0, joined));
      recurrent.assign({grad.h, first, rows}, {grad.gates, begin, rows});
    }
  };
  for_rows_of_batch(steps, grad.h.size(0), recurrent, has(w_hr), run);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
lstm_layer_backward(const std::optional<at::Tensor>& grad_output,
                    const std::optional<at::Tensor>& grad_h_n,
                    const std::optional<at::Tensor>& grad_c_n, const at::Tensor& input,
                    const at::Tensor& h0, const at::Tensor& c0, const at::Tensor& w_ih,
                    const at::Tensor& w_hh, const std::optional<at::Tensor>& w_hr,
                    const std::optional<at::Tensor>& batch_sizes, bool reverse,
                    const at::Tensor& output, const at::Tensor& gates, const at::Tensor& cells,
                    const at::Tensor& hidden, std::array<bool, 7> needs) {
  constexpr const char* op = "lstm_backward";
  check_layer(op, input, h0, c0, {w_ih, w_hh, std::nullopt, std::nullopt, w_hr}, has(batch_sizes));
  const std::vector<LstmStep> steps = lstm_steps(op, input, h0.size(0), batch_sizes, reverse);
  check_saved(op, input, h0, c0, output, gates, cells);
  if (has(grad_output)) check_like_input(op, "grad_output", *grad_output, input, output.sizes());
  if (has(grad_h_n)) check_like_input(op, "grad_h_n", *grad_h_n, input, h0.sizes());
  if (has(grad_c_n)) check_like_input(op, "grad_c_n", *grad_c_n, input, c0.sizes());
  const PlainProducts plain_products;
  const c10::DeviceGuard device_guard(input.device());

  const at::Tensor rows = as_rows(input), activated = gates.contiguous();
  const auto rows_or_undefined = [](const std::optional<at::Tensor>& maybe_tensor) {
    return has(maybe_tensor) ? as_rows(*maybe_tensor) : at::Tensor();
  };
  StepGradients grad;
  grad.h = fresh(rows_or_undefined(grad_h_n), h0);
  grad.c = fresh(rows_or_undefined(grad_c_n), c0);
  grad.gates = at::empty(activated.sizes(), activated.options());
  if (has(w_hr)) grad.projected = at::empty({rows.size(0), h0.size(1)}, rows.options());
  backward_steps(op, steps, rows_or_undefined(grad_output), c0.contiguous(), w_hh, w_hr, activated,
                 cells.contiguous(), grad);

  const at::Tensor grad_gates_t = grad.gates.t();
  const auto grad_input = [&] { return product(grad.gates, w_ih).view(input.sizes()); };
  const auto grad_w_hh = [&] {
    return product(grad_gates_t, states_before(as_rows(output), h0, steps, reverse));
  };
  return {needs[0] ? grad_input() : not_needed(input),
          needs[1] ? grad.h : not_needed(input),
          needs[2] ? grad.c : not_needed(input),
          needs[3] ? product(grad_gates_t, rows) : not_needed(input),
          needs[4] ? grad_w_hh() : not_needed(input),
          needs[5] ? at::sum(grad.gates, 0) : not_needed(input),
          needs[6] && has(w_hr) ? product(grad.projected.t(), hidden) : not_needed(input)};
}

}  // namespace fused
