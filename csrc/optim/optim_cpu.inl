// Optimizer steps on the CPU, included once per instruction set. Each loop is one pass over memory;
// g++ vectorises it. ivdep, not __restrict: an element's operands may be one and the same (a
// parameter that is its own gradient), but no element depends on another.

template <typename T, bool kAmsgrad, bool kScaled>
static void adam_range(const AdamTensor& t, const AdamScales<Accumulator<T>>& s, int64_t begin,
                       int64_t end) {
  using A = Accumulator<T>;
  T* param = static_cast<T*>(t.param);
  T* grad = static_cast<T*>(t.grad);
  T* exp_avg = static_cast<T*>(t.exp_avg);
  T* exp_avg_sq = static_cast<T*>(t.exp_avg_sq);
  T* max_exp_avg_sq = static_cast<T*>(t.maybe_max_exp_avg_sq);
  const AdamScales<A> scales = s;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    A g = load(grad[i]);
    if (kScaled) {
      g = g / scales.grad_scale;
      grad[i] = store<T>(g);
    }
    A p = load(param[i]), m = load(exp_avg[i]), v = load(exp_avg_sq[i]);
    A v_max = kAmsgrad ? load(max_exp_avg_sq[i]) : A(0);
    adam_element<kAmsgrad>(scales, g, p, m, v, v_max);
    param[i] = store<T>(p);
    exp_avg[i] = store<T>(m);
    exp_avg_sq[i] = store<T>(v);
    if (kAmsgrad) max_exp_avg_sq[i] = store<T>(v_max);
  }
}

template <typename T, bool kMomentum, bool kScaled>
static void sgd_range(const SgdTensor& t, const SgdScales<Accumulator<T>>& s, int64_t begin,
                      int64_t end) {
  using A = Accumulator<T>;
  T* param = static_cast<T*>(t.param);
  T* grad = static_cast<T*>(t.grad);
  T* momentum_buffer = static_cast<T*>(t.maybe_momentum_buffer);
  const SgdScales<A> scales = s;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    A g = load(grad[i]);
    if (kScaled) {
      g = g / scales.grad_scale;
      grad[i] = store<T>(g);
    }
    A p = load(param[i]);
    A buffer = kMomentum ? load(momentum_buffer[i]) : A(0);
    sgd_element<kMomentum>(scales, g, p, buffer);
    param[i] = store<T>(p);
    if (kMomentum) momentum_buffer[i] = store<T>(buffer);
  }
}

// Elements [begin, end) of a tensor, with the options as compile-time constants of its loop.
template <typename T>
static void adam_chunk(const AdamParams& p, const AdamTensor& t,
                       const AdamScales<Accumulator<T>>& s, int64_t begin, int64_t end) {
  const bool scaled = p.gradients.maybe_grad_scale != nullptr;
  if (p.amsgrad) {
    scaled ? adam_range<T, true, true>(t, s, begin, end)
           : adam_range<T, true, false>(t, s, begin, end);
  } else {
    scaled ? adam_range<T, false, true>(t, s, begin, end)
           : adam_range<T, false, false>(t, s, begin, end);
  }
}

template <typename T>
static void sgd_chunk(const SgdParams& p, const SgdTensor& t, const SgdScales<Accumulator<T>>& s,
                      int64_t begin, int64_t end) {
  const bool scaled = p.gradients.maybe_grad_scale != nullptr;
  if (p.momentum != 0) {
    scaled ? sgd_range<T, true, true>(t, s, begin, end)
           : sgd_range<T, true, false>(t, s, begin, end);
  } else {
    scaled ? sgd_range<T, false, true>(t, s, begin, end)
           : sgd_range<T, false, false>(t, s, begin, end);
  }
}
