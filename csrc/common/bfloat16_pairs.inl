// Products of bfloat16 in block_gemm by the CPU's own instruction, which multiplies two at a time
// and adds up in float: a step of k is a pair of elements that follow each other along k. It takes
// subnormal elements for zeros. Part of avx512_bf16.inl; <immintrin.h> comes before it.

// The first of two elements in the low half. It may lie anywhere among a tensor's elements.
struct __attribute__((may_alias, packed)) Pair {
  uint32_t bits;
};

template <>
struct OperandOf<BFloat16> {
  using type = Pair;
};
template <>
constexpr int64_t kSteps<Pair> = 2;

template <>
struct VectorOf<Pair> {
  typedef uint32_t type __attribute__((vector_size(FUSED_VECTOR_BYTES), may_alias));
  typedef uint32_t unaligned_type
      __attribute__((vector_size(FUSED_VECTOR_BYTES), may_alias, aligned(1)));
};

template <>
struct ProductOf<Pair> {
  using Sum = float;
  using Vector = VectorOf<float>::type;
  static inline Vector multiply_add(const Vector& sum, Pair element,
                                    const VectorOf<Pair>::type& row) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(element.bits),
                                    (__m512bh)row);
  }
};

// to[i] = (low[i], high[i]) for 16 floats of each, rounded.
static inline void store_pairs(const float* low, const float* high, Pair* to) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)rounded));
}

// to[i] = (from[2 i], from[2 i + 1]) for 32 floats, rounded.
static inline void store_neighbours(const float* from, Pair* to) {
  _mm512_storeu_si512(
      to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
}

// to[i * to_stride] = (low[i * stride], maybe_high[i * stride]) as they are, with zeros for the
// second where there is none.
static inline void join_pairs(const BFloat16* low, const BFloat16* maybe_high, int64_t stride,
                              int64_t count, Pair* to, int64_t to_stride) {
  if (maybe_high == nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i * to_stride].bits = low[i * stride].bits;
  } else if (maybe_high == low + 1 && stride == 2 && to_stride == 1) {
    std::memcpy(to, low, count * sizeof(Pair));
  } else if (stride == 1 && to_stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      to[i].bits = low[i].bits | static_cast<uint32_t>(maybe_high[i].bits) << 16;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i * to_stride].bits =
          low[i * stride].bits | static_cast<uint32_t>(maybe_high[i * stride].bits) << 16;
    }
  }
}

static inline void pack_elements(Pair* to, int64_t to_stride, const BFloat16* from,
                                 int64_t from_stride, int64_t count, int64_t step_stride,
                                 bool whole) {
  join_pairs(from, whole ? from + step_stride : nullptr, from_stride, count, to, to_stride);
}
