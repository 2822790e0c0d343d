// The CPU's matrix products of lstm_product.h, included once per instruction set.
//
// B is packed as elements of a product, in stripes of the vectors that block_gemm takes at once:
// [stripe][element of k][columns], zeros behind the last column, so that it is read in order. A is
// copied to elements block by block unless it is rows of them already; C is summed in floats,
// beside it unless they are its own.

#include "common/transpose.inl"

constexpr int64_t kStripe = kMostVectors * kLanes<float>;
// Blocks of A of 64 rows by 128 elements. Each block along k is summed by itself, so that rounding
// grows with 128 + k / 128 additions and not with k: in one chain the weight gradients of 330 rows
// came out four times as far from the truth as PyTorch's, which adds up step by step. Blocks of 256
// are 5 % faster.
constexpr int64_t kRowBlock = 64;
constexpr int64_t kDepthBlock = 128;

// Calls visit(T{}) with the storage type of a matrix.
template <typename Visitor>
static inline void visit_product_dtype(DType dtype, const Visitor& visit) {
  if (dtype == DType::kFloat16) return visit(Half{});
  if (dtype == DType::kBFloat16) return visit(BFloat16{});
  visit(float{});
}

static inline int64_t product_stripes(int64_t n) { return (n + kStripe - 1) / kStripe; }

static int64_t product_packed_size(DType dtype, int64_t k, int64_t n) {
  int64_t bytes = 0;
  visit_product_dtype(dtype, [&](auto zero) {
    using E = Operand<decltype(zero)>;
    bytes = product_stripes(n) * kStripe * num_elements<E>(k) * static_cast<int64_t>(sizeof(E));
  });
  return bytes;
}

template <typename T>
static void product_pack_stripe(const CpuMatrix& b, int64_t k, int64_t n, int64_t stripe,
                                Operand<T>* packed) {
  using E = Operand<T>;
  const int64_t elements = num_elements<E>(k), whole = k / kSteps<E>;
  const int64_t first = stripe * kStripe, columns = std::min(kStripe, n - first);
  const T* data = static_cast<const T*>(b.data) + first * b.stride1;
  E* out = packed + stripe * kStripe * elements;
  if (columns < kStripe) std::fill(out, out + elements * kStripe, E{});
  if (b.stride1 == 1) {
    for (int64_t i = 0; i < elements; ++i) {
      pack_elements(out + i * kStripe, 1, data + i * kSteps<E> * b.stride0, 1, columns, b.stride0,
                    i < whole);
    }
    return;
  }
  const int64_t step = kSteps<E> * b.stride0;
  // Where elements lie one after another, they are turned over in registers.
  const bool in_rows = b.stride0 == 1 && b.stride1 % kSteps<E> == 0;
  if (in_rows) {
    using Source = std::conditional_t<kSteps<E> == 1, T, E>;
    const Source* from = reinterpret_cast<const Source*>(data);
    const int64_t stride = b.stride1 / kSteps<E>;
    transpose(out, kStripe, from, stride, columns, whole, from + (columns - 1) * stride + whole);
  }
  for (int64_t j = 0; j < columns; ++j) {
    const T* column = data + j * b.stride1;
    if (!in_rows) pack_elements(out + j, kStripe, column, step, whole, b.stride0, true);
    pack_elements(out + whole * kStripe + j, kStripe, column + whole * step, step, elements - whole,
                  b.stride0, false);
  }
}

static void product_pack(const CpuMatrix& b, int64_t k, int64_t n, void* packed, int64_t begin,
                         int64_t end) {
  visit_product_dtype(b.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t stripe = begin; stripe < end; ++stripe) {
      product_pack_stripe<T>(b, k, n, stripe, static_cast<Operand<T>*>(packed));
    }
  });
}

// Rows [row, row + rows) and columns [depth, depth + depths) of A as elements: row after row, or
// column after column where A lies so. block_gemm takes both, and a copy that turned them round
// would miss the cache at every element.
template <typename T>
static void product_copy_a(const CpuMatrix& a, int64_t row, int64_t rows, int64_t depth,
                           int64_t depths, Operand<T>* out) {
  using E = Operand<T>;
  const int64_t elements = num_elements<E>(depths), whole = depths / kSteps<E>;
  const T* data = static_cast<const T*>(a.data) + row * a.stride0 + depth * a.stride1;
  if (a.stride1 == 1) {
    for (int64_t i = 0; i < rows; ++i, data += a.stride0, out += elements) {
      pack_elements(out, 1, data, kSteps<E>, whole, 1, true);
      pack_elements(out + whole, 1, data + whole * kSteps<E>, 1, elements - whole, 1, false);
    }
  } else {
    for (int64_t j = 0; j < elements; ++j) {
      pack_elements(out + j * rows, 1, data + j * kSteps<E> * a.stride1, a.stride0, rows, a.stride1,
                    j < whole);
    }
  }
}

// Whether rows of A are rows of elements as they lie.
template <typename T>
static inline bool product_reads_a(const CpuMatrix& a, int64_t k) {
  constexpr int64_t kEach = kSteps<Operand<T>>;
  return sizeof(Operand<T>) == kEach * sizeof(T) && a.stride1 == 1 && a.stride0 % kEach == 0 &&
         k % kEach == 0;
}

// One block of rows times the stripes [stripe_begin, stripe_end).
template <typename T>
static void product_block(const CpuProductParams& p, int64_t row, int64_t stripe_begin,
                          int64_t stripe_end, Operand<T>* copy_of_a, float* sums) {
  using E = Operand<T>;
  const int64_t rows = std::min(kRowBlock, p.m - row), elements = num_elements<E>(p.k);
  const int64_t width = (stripe_end - stripe_begin) * kStripe;
  const int64_t first = stripe_begin * kStripe, columns = std::min(width, p.n - first);
  T* const c = static_cast<T*>(p.c) + row * p.row_stride_c + first;
  // Floats in whole stripes are summed where they will lie. (All stripes or none: a sum must not
  // depend on how they are shared out among threads.)
  const bool in_place = std::is_same_v<T, float> && p.n % kStripe == 0;
  float* const to = in_place ? reinterpret_cast<float*>(c) : sums;
  const int64_t to_stride = in_place ? p.row_stride_c : width;
  const bool by_rows = p.a.stride1 == 1, directly = product_reads_a<T>(p.a, p.k);
  const E* packed = static_cast<const E*>(p.packed);
  for (int64_t depth = 0; depth < elements; depth += kDepthBlock) {
    const int64_t depths = std::min(kDepthBlock, elements - depth), step = depth * kSteps<E>;
    const E* a = copy_of_a;
    int64_t row_stride = by_rows ? depths : 1;
    if (directly) {
      a = reinterpret_cast<const E*>(static_cast<const T*>(p.a.data) + row * p.a.stride0 + step);
      row_stride = p.a.stride0 / kSteps<E>;
    } else {
      product_copy_a<T>(p.a, row, rows, step, std::min(depths * kSteps<E>, p.k - step), copy_of_a);
    }
    for (int64_t stripe = stripe_begin; stripe < stripe_end; ++stripe) {
      block_gemm<E>(rows, kStripe, depths, a, row_stride, by_rows ? 1 : rows,
                    packed + (stripe * elements + depth) * kStripe, kStripe,
                    to + (stripe - stripe_begin) * kStripe, to_stride,
                    depth > 0 || (in_place && p.accumulate));
    }
  }
  if (in_place) return;
  for (int64_t i = 0; i < rows; ++i) {
    T* row_of_c = c + i * p.row_stride_c;
    const float* sum = sums + i * width;
    if (p.accumulate) {
      for (int64_t j = 0; j < columns; ++j) row_of_c[j] = store<T>(load(row_of_c[j]) + sum[j]);
    } else {
      for (int64_t j = 0; j < columns; ++j) row_of_c[j] = store<T>(sum[j]);
    }
  }
}

// Tasks [begin, end) of row blocks times `groups` groups of stripes.
static void product_tasks(const CpuProductParams& p, int64_t groups, int64_t begin, int64_t end) {
  const int64_t stripes = product_stripes(p.n);
  const int64_t per_group = (stripes + groups - 1) / groups;
  const int64_t block_rows = std::min(kRowBlock, p.m);
  const Scratch<float> sums(block_rows * per_group * kStripe);
  visit_product_dtype(p.a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Scratch<Operand<T>> copy_of_a(block_rows * std::min(kDepthBlock, p.k));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / groups * kRowBlock;
      const int64_t stripe = task % groups * per_group;
      const int64_t stripe_end = std::min(stripe + per_group, stripes);
      if (stripe >= stripe_end) continue;
      product_block<T>(p, row, stripe, stripe_end, copy_of_a.data(), sums.data());
    }
  });
}
