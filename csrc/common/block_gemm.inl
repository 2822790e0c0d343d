// The small matrix product inside the CPU kernels: C (+)= A B on blocks that stay in cache, written
// with g++'s vector types so that each instruction set gets its own registers. Included once per
// instruction set by for_each_isa.inl.
//
// Every element of C is one chain of fused multiply-adds over k in ascending order, whatever the
// block's shape, so a row's result does not depend on the rows that it is computed with. The chain
// begins at zero and what C holds already is added last: sums cut into blocks lose fewer digits.

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(FUSED_VECTOR_BYTES)));
  typedef A unaligned_type __attribute__((vector_size(FUSED_VECTOR_BYTES), aligned(sizeof(A))));
};

// What the elements of a product are and how they are multiplied: numbers here; a kind of element
// of which each stands for several steps of k may say otherwise (bfloat16_pairs.inl).
template <typename E>
struct ProductOf {
  using Sum = E;
  using Vector = typename VectorOf<E>::type;
  static inline Vector multiply_add(const Vector& sum, E element, const Vector& row) {
    return sum + element * row;
  }
};
template <typename E>
using ProductSum = typename ProductOf<E>::Sum;

// The elements that a product over a tensor of T's multiplies, and the steps of k in each.
template <typename T>
struct OperandOf {
  using type = Accumulator<T>;
};
template <typename T>
using Operand = typename OperandOf<T>::type;
template <typename E>
constexpr int64_t kSteps = 1;

template <typename E>
static inline int64_t num_elements(int64_t steps) {
  return (steps + kSteps<E> - 1) / kSteps<E>;
}

// to[i * to_stride] = the element whose steps begin at from[i * from_stride] and lie `step_stride`
// apart: as many as an element has, or where `whole` is false one fewer.
template <typename T, typename A>
static inline void pack_elements(A* to, int64_t to_stride, const T* from, int64_t from_stride,
                                 int64_t count, int64_t /*step_stride*/, bool /*whole*/) {
  if (to_stride == 1 && from_stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
  } else if (to_stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = load(from[i * from_stride]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * to_stride] = load(from[i * from_stride]);
  }
}

// Elements in a vector register.
template <typename A>
constexpr int64_t kLanes = FUSED_VECTOR_BYTES / sizeof(A);

// `columns` rounded up to whole vectors: the leading dimension that block_gemm asks for.
template <typename A>
static inline int64_t padded(int64_t columns) {
  return (columns + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Where the elements of an operand lie along one of its axes: evenly spaced, or anywhere.
struct Spaced {
  int64_t stride, first = 0;
  int64_t operator[](int64_t i) const { return first + i * stride; }
  Spaced from(int64_t i) const { return {stride, first + i * stride}; }
};
struct Listed {
  const int64_t* offsets;
  int64_t operator[](int64_t i) const { return offsets[i]; }
  Listed from(int64_t i) const { return {offsets + i}; }
};

// C[kRows, kVectors * lanes] (+)= A[kRows, k] B[k, kVectors * lanes], C held in registers.
// A's elements lie at a[rows_a[row] + steps_a[k]], B's rows begin at b[steps_b[k]], C's at
// c[rows_c[row]]. A function of its own always: the addresses alone fill the general registers, and
// inlined among others its loop would spill them.
template <typename E, int kRows, int kVectors, typename RowsA, typename StepsA, typename StepsB,
          typename RowsC>
__attribute__((noinline)) static void gemm_tile(int64_t k, const E* a, RowsA rows_a, StepsA steps_a,
                                                const E* b, StepsB steps_b, ProductSum<E>* c,
                                                RowsC rows_c, bool accumulate) {
  using Sum = ProductSum<E>;
  using SumVector = typename VectorOf<Sum>::type;
  using UnalignedSum = typename VectorOf<Sum>::unaligned_type;
  using Unaligned = typename VectorOf<E>::unaligned_type;
  SumVector sum[kRows][kVectors];
  const E* row_of_a[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row_of_a[r] = a + rows_a[r];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = SumVector{};
  }
  for (int64_t i = 0; i < k; ++i) {
    typename VectorOf<E>::type row_of_b[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      row_of_b[v] = *reinterpret_cast<const Unaligned*>(b + steps_b[i] + v * kLanes<E>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const E element = row_of_a[r][steps_a[i]];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = ProductOf<E>::multiply_add(sum[r][v], element, row_of_b[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      UnalignedSum* out = reinterpret_cast<UnalignedSum*>(c + rows_c[r] + v * kLanes<E>);
      *out = accumulate ? SumVector(*out) + sum[r][v] : sum[r][v];
    }
  }
}

// Vectors in the widest stripe that is worth its registers.
constexpr int kMostVectors = FUSED_VECTOR_BYTES == 64 ? 4 : 3;

// All rows of one stripe of kVectors columns of vectors.
template <typename E, int kVectors, typename RowsA, typename StepsA, typename StepsB,
          typename RowsC>
static inline void gemm_stripe(int64_t m, int64_t k, const E* a, RowsA rows_a, StepsA steps_a,
                               const E* b, StepsB steps_b, ProductSum<E>* c, RowsC rows_c,
                               bool accumulate) {
  // 32 registers with AVX-512, 16 otherwise: kRows * kVectors sums, one row of B, one of A. (Five
  // rows of four fit too and are no faster; they leave rows over more often. Six are: g++ 12 keeps
  // more than one element of A there and spills.)
  constexpr int kRows = FUSED_VECTOR_BYTES == 64 && kVectors != 4 ? 8 : 4;
  int64_t row = 0;
  const auto tile = [&](auto rows) {
    constexpr int kTileRows = decltype(rows)::value;
    gemm_tile<E, kTileRows, kVectors>(k, a, rows_a, steps_a, b, steps_b, c, rows_c, accumulate);
    rows_a = rows_a.from(kTileRows);
    rows_c = rows_c.from(kTileRows);
    row += kTileRows;
  };
  while (m - row >= kRows) tile(std::integral_constant<int, kRows>{});
  if (m - row >= 4) tile(std::integral_constant<int, 4>{});
  if (m - row >= 2) tile(std::integral_constant<int, 2>{});
  if (m - row >= 1) tile(std::integral_constant<int, 1>{});
}

// C[m, n] (+)= A[m, k] B[k, n]. B and C are read and written in whole vectors: their rows must be
// padded<E>(n) long, and what B holds there must be finite or ignored by the caller. A's elements
// lie at a[rows_a[row] + steps_a[k]], B's rows begin at b[steps_b[k]], C's at c[rows_c[row]].
//
// Three vectors at a time, four where one would be left over and there are the registers: the fewer
// a stripe has, the more of its time goes into elements of A.
template <typename E, typename RowsA, typename StepsA, typename StepsB, typename RowsC>
static inline void indexed_block_gemm(int64_t m, int64_t n, int64_t k, const E* a, RowsA rows_a,
                                      StepsA steps_a, const E* b, StepsB steps_b, ProductSum<E>* c,
                                      RowsC rows_c, bool accumulate) {
  int64_t left = (n + kLanes<E> - 1) / kLanes<E>;
  const auto stripe = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    gemm_stripe<E, kVectors>(m, k, a, rows_a, steps_a, b, steps_b, c, rows_c, accumulate);
    b += kVectors * kLanes<E>;
    c += kVectors * kLanes<E>;
    left -= kVectors;
  };
  while (left > 0) {
    if (kMostVectors == 4 && left % 3 != 0 && (left == 4 || left >= 7)) {
      stripe(std::integral_constant<int, kMostVectors>{});
    } else if (left >= 3) {
      stripe(std::integral_constant<int, 3>{});
    } else if (left == 2) {
      stripe(std::integral_constant<int, 2>{});
    } else {
      stripe(std::integral_constant<int, 1>{});
    }
  }
}

// The same for evenly spaced operands: A may be transposed, its elements lie at
// a[row * row_stride_a + k * k_stride_a].
template <typename E>
static inline void block_gemm(int64_t m, int64_t n, int64_t k, const E* a, int64_t row_stride_a,
                              int64_t k_stride_a, const E* b, int64_t ldb, ProductSum<E>* c,
                              int64_t ldc, bool accumulate) {
  indexed_block_gemm<E>(m, n, k, a, Spaced{row_stride_a}, Spaced{k_stride_a}, b, Spaced{ldb}, c,
                        Spaced{ldc}, accumulate);
}
