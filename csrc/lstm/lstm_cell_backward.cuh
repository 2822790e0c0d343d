// LSTM cell backward, pointwise: from the gradients of c_next and h_next to those of the products'
// sum and of c_prev. The formulas and buffers are in lstm.h.
//
// The same split as forward: one thread owns N neighbouring hidden elements of one row, so that
// grad_c_prev may overwrite grad_c.
#pragma once

#include "lstm/lstm_cell.cuh"

namespace fused {

template <typename T, int N>
__global__ void __launch_bounds__(kLstmThreads)
    lstm_cell_backward_kernel(LstmCellBackwardParams p) {
  using A = Accumulator<T>;
  const int64_t hidden = p.hidden_size;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = thread / (hidden / N);
  const int64_t column = thread % (hidden / N) * N;
  if (row >= p.batch) return;

  const int64_t gates = row * 4 * hidden + column;
  const int64_t index = row * hidden + column;
  A i[N], f[N], g[N], o[N], c_prev[N], grad_h[N], grad_output[N], grad_c[N];
  load_hidden<T, N>(p.gates, gates, i);
  load_hidden<T, N>(p.gates, gates + hidden, f);
  load_hidden<T, N>(p.gates, gates + 2 * hidden, g);
  load_hidden<T, N>(p.gates, gates + 3 * hidden, o);
  load_hidden<T, N>(p.c_prev, index, c_prev);
  load_hidden_or_zero<T, N>(p.maybe_grad_h, index, grad_h);
  load_hidden_or_zero<T, N>(p.maybe_grad_output, index, grad_output);
  load_hidden_or_zero<T, N>(p.maybe_grad_c, index, grad_c);

  A grad_i[N], grad_f[N], grad_g[N], grad_o[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const A tanh_c = hyperbolic_tangent(f[n] * c_prev[n] + i[n] * g[n]);
    const A dh = grad_h[n] + grad_output[n];
    const A dc = grad_c[n] + dh * o[n] * (A(1) - tanh_c * tanh_c);
    grad_i[n] = dc * g[n] * i[n] * (A(1) - i[n]);
    grad_f[n] = dc * c_prev[n] * f[n] * (A(1) - f[n]);
    grad_g[n] = dc * i[n] * (A(1) - g[n] * g[n]);
    grad_o[n] = dh * tanh_c * o[n] * (A(1) - o[n]);
    grad_c[n] = dc * f[n];
  }
  store_hidden<T, N>(p.grad_gates, gates, grad_i);
  store_hidden<T, N>(p.grad_gates, gates + hidden, grad_f);
  store_hidden<T, N>(p.grad_gates, gates + 2 * hidden, grad_g);
  store_hidden<T, N>(p.grad_gates, gates + 3 * hidden, grad_o);
  store_hidden<T, N>(p.grad_c_prev, index, grad_c);
}

}  // namespace fused
