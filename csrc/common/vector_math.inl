// Elementary functions that g++ can vectorise: no branch, no table, no library call. Included once
// per instruction set by for_each_isa.inl; double goes to the C library.
//
// Kernels are compiled without -fassociative-math: it would let g++ fold the two steps of the range
// reduction into one and lose its point. Reductions ask for their freedom where they need it, with
// `#pragma omp simd reduction(...)`.

// exp(x). Cody-Waite reduction by ln 2, then the Taylor polynomial of degree 7 on
// [-ln2/2, ln2/2]. The scale 2^n is applied in two halves, so that results down to the
// smallest subnormal and up to the largest float come out right; NaN passes, inf gives inf or 0.
static inline float vector_exp(float x) {
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float n = (clamped * 1.44269504088896341f + kRounder) - kRounder;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  const float r2 = r * r;
  const float e = p * r2 + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(n == n ? n : 0.0f);
  const int32_t half = exponent >> 1;
  const float scale0 = detail::bit_cast<float>((half + 127) << 23);
  const float scale1 = detail::bit_cast<float>((exponent - half + 127) << 23);
  const float result = e * scale0 * scale1;
  return x == x ? result : x;
}
static inline double vector_exp(double x) { return std::exp(x); }

// exp(x) of a register of weights in a softmax, where x is at most a little above 0: by half the
// instructions, because what would be below the smallest normal number is 0. The polynomial is the
// best of degree 6 that begins with 1 + r: off by 3e-9 of the result.
static inline VectorOf<float>::type softmax_exp(const VectorOf<float>::type& x) {
  using Vector = VectorOf<float>::type;
  typedef int32_t Bits __attribute__((vector_size(FUSED_VECTOR_BYTES)));
  constexpr float kLowest = -87.0f;
  constexpr float kRounder = 12582912.0f;  // as above; its bits end in nine zeros
  const Vector lowest = Vector{} + kLowest;
  const Vector clamped = lowest > x ? lowest : x;
  const Vector rounded = clamped * 1.44269504088896341f + kRounder;
  const Vector n = rounded - kRounder;
  // With fused multiply-adds one step does: it rounds once, and ln 2 is off by 2e-9.
  const Vector r = FUSED_VECTOR_BYTES > 16 ? clamped - n * 0.693147181f
                                           : (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.38145965e-3f + 8.36871751e-3f;
  p = p * r + 4.16683890e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vector scale = (Vector)(((Bits)rounded << 23) + 0x3f800000);
  return x < lowest ? Vector{} : p * scale;
}
static inline VectorOf<double>::type softmax_exp(const VectorOf<double>::type& x) {
  VectorOf<double>::type result{};
  for (int64_t i = 0; i < kLanes<double>; ++i) result[i] = std::exp(x[i]);
  return result;
}

// exp(x) to be added to 1, by half of vector_exp's instructions: below -87 it stays as small as it
// is there. The polynomial is twice softmax_exp's and the scale half of it: 2^128 would be
// infinity.
static inline float exp_beside_one(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 89.0f ? 89.0f : x);
  const float rounded = clamped * 1.44269504088896341f + 12582912.0f;
  const float n = rounded - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = r * 2.76291930e-3f + 1.673743502e-2f;
  p = p * r + 8.33367780e-2f;
  p = p * r + 3.33330422e-1f;
  p = p * r + 1.0f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  const uint32_t scale = (detail::bit_cast<uint32_t>(rounded) << 23) + 0x3f000000u;
  return p * detail::bit_cast<float>(scale);
}
static inline double exp_beside_one(double x) { return std::exp(x); }

// 1 / (1 + exp(-x)), exact at both ends.
template <typename A>
static inline A vector_sigmoid(A x) {
  return A(1) / (A(1) + exp_beside_one(-x));
}

// tanh(x): an odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel.
static inline float vector_tanh(float x) {
  const float magnitude = __builtin_fabsf(x);
  const float x2 = x * x;
  float p = -5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  const float small = x + x * x2 * p;
  const float large = 1.0f - 2.0f / (exp_beside_one(2.0f * magnitude) + 1.0f);
  return magnitude < 0.625f ? small : __builtin_copysignf(large, x);
}
static inline double vector_tanh(double x) { return std::tanh(x); }
