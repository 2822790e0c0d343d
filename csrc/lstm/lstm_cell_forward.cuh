// LSTM cell forward, pointwise: bias, activations, cell and hidden update in one pass. The formulas
// and buffers are in lstm.h.
//
// One thread owns N neighbouring hidden elements of one row: it reads their 4 N gates as four
// packs, H apart, and nothing that another thread writes, so that gates and cell can be updated in
// place. A one-dimensional grid covers rows * (H / N) threads.
#pragma once

#include "lstm/lstm_cell.cuh"

namespace fused {

template <typename T, int N>
__global__ void __launch_bounds__(kLstmThreads) lstm_cell_forward_kernel(LstmCellForwardParams p) {
  using A = Accumulator<T>;
  const int64_t hidden = p.hidden_size;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = thread / (hidden / N);
  const int64_t column = thread % (hidden / N) * N;
  if (row >= p.batch) return;

  // Gates: i, f, g, o.
  A gate[4][N];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    A bias_ih[N], bias_hh[N];
    load_hidden<T, N>(p.gates, row * 4 * hidden + k * hidden + column, gate[k]);
    load_hidden_or_zero<T, N>(p.maybe_bias_ih, k * hidden + column, bias_ih);
    load_hidden_or_zero<T, N>(p.maybe_bias_hh, k * hidden + column, bias_hh);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const A sum = gate[k][n] + (bias_ih[n] + bias_hh[n]);
      gate[k][n] = k == 2 ? hyperbolic_tangent(sum) : sigmoid(sum);
    }
    store_hidden<T, N>(p.gates, row * 4 * hidden + k * hidden + column, gate[k]);
  }

  // Cell and hidden state.
  const int64_t index = row * hidden + column;
  A c[N], h[N];
  load_hidden<T, N>(p.c_prev, index, c);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    c[n] = gate[1][n] * c[n] + gate[0][n] * gate[2][n];
    h[n] = gate[3][n] * hyperbolic_tangent(c[n]);
  }
  store_hidden<T, N>(p.c_next, index, c);
  store_hidden<T, N>(p.h_next, index, h);
  if (p.maybe_c_copy != nullptr) store_hidden<T, N>(p.maybe_c_copy, index, c);
  if (p.maybe_h_copy != nullptr) store_hidden<T, N>(p.maybe_h_copy, index, h);
}

}  // namespace fused
