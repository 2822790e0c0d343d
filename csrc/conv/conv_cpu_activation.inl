// The activations and their derivatives over rows of accumulators, written so that g++ vectorises.

// erf(x): a rational function on [-4, 4], beyond which float has no digit left; off by at most
// 4e-7.
static inline float vector_erf(float x) {
  const float clamped = x < -4.0f ? -4.0f : (x > 4.0f ? 4.0f : x);
  const float x2 = clamped * clamped;
  float p = -2.72614225801306e-10f;
  p = p * x2 + 2.77068142495902e-08f;
  p = p * x2 - 2.10102402082508e-06f;
  p = p * x2 - 5.69250639462346e-05f;
  p = p * x2 - 7.34990630326855e-04f;
  p = p * x2 - 2.95459980854025e-03f;
  p = p * x2 - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * x2 - 2.13374055278905e-04f;
  q = q * x2 - 1.68282697438203e-03f;
  q = q * x2 - 7.37332916720468e-03f;
  q = q * x2 - 1.42647390514189e-02f;
  return clamped * p / q;
}
static inline double vector_erf(double x) { return std::erf(x); }

template <typename A, typename F>
static inline void map_row(A* x, int64_t count, const F& f) {
  for (int64_t i = 0; i < count; ++i) x[i] = f(x[i]);
}

// x = act(x).
template <typename A>
static inline void activate(Activation activation, A* x, int64_t count) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return map_row(x, count, [](A v) { return v < A(0) ? A(0) : v; });
    case Activation::kGelu:
      return map_row(x, count, [](A v) {
        return v * A(0.5) * (A(1) + vector_erf(v * A(0.70710678118654752440)));
      });
    case Activation::kSilu:
      return map_row(x, count, [](A v) { return v / (A(1) + vector_exp(-v)); });
    case Activation::kLeakyRelu:
      return map_row(x, count, [](A v) { return v < A(0) ? v * A(kLeakySlope) : v; });
    case Activation::kSigmoid:
      return map_row(x, count, [](A v) { return vector_sigmoid(v); });
    case Activation::kTanh:
      return map_row(x, count, [](A v) { return vector_tanh(v); });
  }
}

template <typename A, typename F>
static inline void scale_row(A* grad, const A* saved, int64_t count, const F& derivative) {
  for (int64_t i = 0; i < count; ++i) grad[i] *= derivative(saved[i]);
}

// grad *= act', from the output, or for gelu and silu from what went in.
template <typename A>
static inline void activate_backward(Activation activation, A* grad, const A* saved,
                                     int64_t count) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:  // a selection, not a product: 0 * inf must give 0
      for (int64_t i = 0; i < count; ++i) grad[i] = saved[i] <= A(0) ? A(0) : grad[i];
      return;
    case Activation::kGelu:
      return scale_row(grad, saved, count, [](A v) {
        const A cdf = A(0.5) * (A(1) + vector_erf(v * A(0.70710678118654752440)));
        return cdf + v * A(0.39894228040143267794) * vector_exp(A(-0.5) * v * v);
      });
    case Activation::kSilu:
      return scale_row(grad, saved, count, [](A v) {
        const A s = vector_sigmoid(v);
        return s * (A(1) + v * (A(1) - s));
      });
    case Activation::kLeakyRelu:
      return scale_row(grad, saved, count, [](A v) { return v > A(0) ? A(1) : A(kLeakySlope); });
    case Activation::kSigmoid:
      return scale_row(grad, saved, count, [](A v) { return v * (A(1) - v); });
    case Activation::kTanh:
      return scale_row(grad, saved, count, [](A v) { return A(1) - v * v; });
  }
}
