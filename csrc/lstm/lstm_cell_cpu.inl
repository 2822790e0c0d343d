// The pointwise part of an LSTM step on the CPU, included once per instruction set. See lstm.h.
//
// One row at a time, with the four gates' streams side by side: the loops are branch-free, so that
// g++ vectorises them whole, conversions from and to the 16-bit types included.

template <typename T>
static void lstm_cell_forward_rows(const LstmCellForwardParams& p, int64_t row_begin,
                                   int64_t row_end) {
  using A = Accumulator<T>;
  const int64_t hidden = p.hidden_size;
  // A missing bias reads zeros, so that one loop serves all four cases.
  const std::vector<T> zeros(p.maybe_bias_ih && p.maybe_bias_hh ? 0 : 4 * hidden, store<T>(A(0)));
  const T* bias_ih = p.maybe_bias_ih ? static_cast<const T*>(p.maybe_bias_ih) : zeros.data();
  const T* bias_hh = p.maybe_bias_hh ? static_cast<const T*>(p.maybe_bias_hh) : zeros.data();
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* gates = static_cast<T*>(p.gates) + row * 4 * hidden;
    const T* c_prev = static_cast<const T*>(p.c_prev) + row * hidden;
    T* c_next = static_cast<T*>(p.c_next) + row * hidden;
    T* h_next = static_cast<T*>(p.h_next) + row * hidden;
    // A copy that nobody wants goes where the original is.
    T* c_copy = p.maybe_c_copy ? static_cast<T*>(p.maybe_c_copy) + row * hidden : c_next;
    T* h_copy = p.maybe_h_copy ? static_cast<T*>(p.maybe_h_copy) + row * hidden : h_next;
    const auto gate = [&](int64_t index) {
      return load(gates[index]) + (load(bias_ih[index]) + load(bias_hh[index]));
    };
#pragma GCC ivdep
    for (int64_t j = 0; j < hidden; ++j) {
      const A i = vector_sigmoid(gate(j));
      const A f = vector_sigmoid(gate(hidden + j));
      const A g = vector_tanh(gate(2 * hidden + j));
      const A o = vector_sigmoid(gate(3 * hidden + j));
      const A c = f * load(c_prev[j]) + i * g;
      gates[j] = store<T>(i);
      gates[hidden + j] = store<T>(f);
      gates[2 * hidden + j] = store<T>(g);
      gates[3 * hidden + j] = store<T>(o);
      const A h = o * vector_tanh(c);
      c_next[j] = store<T>(c);
      c_copy[j] = store<T>(c);
      h_next[j] = store<T>(h);
      h_copy[j] = store<T>(h);
    }
  }
}

template <typename T>
static void lstm_cell_backward_rows(const LstmCellBackwardParams& p, int64_t row_begin,
                                    int64_t row_end) {
  using A = Accumulator<T>;
  const int64_t hidden = p.hidden_size;
  const std::vector<T> zeros(hidden, store<T>(A(0)));  // what a missing gradient reads
  for (int64_t row = row_begin; row < row_end; ++row) {
    const auto row_or_zeros = [&](const void* base) {
      return base ? static_cast<const T*>(base) + row * hidden : zeros.data();
    };
    const T* gates = static_cast<const T*>(p.gates) + row * 4 * hidden;
    const T* c_prev = static_cast<const T*>(p.c_prev) + row * hidden;
    const T* grad_h = row_or_zeros(p.maybe_grad_h);
    const T* grad_output = row_or_zeros(p.maybe_grad_output);
    const T* grad_c = row_or_zeros(p.maybe_grad_c);
    T* grad_gates = static_cast<T*>(p.grad_gates) + row * 4 * hidden;
    T* grad_c_prev = static_cast<T*>(p.grad_c_prev) + row * hidden;
#pragma GCC ivdep
    for (int64_t j = 0; j < hidden; ++j) {
      const A i = load(gates[j]);
      const A f = load(gates[hidden + j]);
      const A g = load(gates[2 * hidden + j]);
      const A o = load(gates[3 * hidden + j]);
      const A tanh_c = vector_tanh(f * load(c_prev[j]) + i * g);
      const A dh = load(grad_h[j]) + load(grad_output[j]);
      const A dc = load(grad_c[j]) + dh * o * (A(1) - tanh_c * tanh_c);
      grad_gates[j] = store<T>(dc * g * i * (A(1) - i));
      grad_gates[hidden + j] = store<T>(dc * load(c_prev[j]) * f * (A(1) - f));
      grad_gates[2 * hidden + j] = store<T>(dc * i * (A(1) - g * g));
      grad_gates[3 * hidden + j] = store<T>(dh * tanh_c * o * (A(1) - o));
      grad_c_prev[j] = store<T>(dc * f);
    }
  }
}

static Status lstm_cell_forward(const LstmCellForwardParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto zero) { lstm_cell_forward_rows<decltype(zero)>(p, begin, end); });
  return nullptr;
}

static Status lstm_cell_backward(const LstmCellBackwardParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto zero) { lstm_cell_backward_rows<decltype(zero)>(p, begin, end); });
  return nullptr;
}
