// The CPU's matrix products of lstm_product.h, included once per instruction set.
//
// B is packed in stripes of three vectors' columns, [stripe][k][columns], zeros behind the last
// column: block_gemm then reads it in order. A is copied to floats block by block unless it is rows
// of floats already; C is summed in floats beside it.

constexpr int64_t kStripe = 3 * kLanes<float>;
// Blocks of A of 64 x 128. Each block along k is summed by itself, so that rounding grows with
// 128 + k / 128 additions and not with k: in one chain the weight gradients of 330 rows came out
// four times as far from the truth as PyTorch's, which adds up step by step. Blocks of 256 are 5 %
// faster.
constexpr int64_t kRowBlock = 64;
constexpr int64_t kDepthBlock = 128;

static inline int64_t product_stripes(int64_t n) { return (n + kStripe - 1) / kStripe; }

static int64_t product_packed_size(int64_t k, int64_t n) {
  return product_stripes(n) * kStripe * k;
}

template <typename T>
static void product_pack_stripe(const CpuMatrix& b, int64_t k, int64_t n, int64_t stripe,
                                float* packed) {
  const T* data = static_cast<const T*>(b.data);
  const int64_t first = stripe * kStripe;
  const int64_t columns = std::min(kStripe, n - first);
  float* out = packed + stripe * kStripe * k;
  if (b.stride1 == 1) {
    for (int64_t i = 0; i < k; ++i) {
      const T* row = data + i * b.stride0 + first;
      for (int64_t j = 0; j < columns; ++j) out[i * kStripe + j] = load(row[j]);
      for (int64_t j = columns; j < kStripe; ++j) out[i * kStripe + j] = 0.0f;
    }
    return;
  }
  for (int64_t j = 0; j < kStripe; ++j) {
    const T* column = data + (first + j) * b.stride1;
    for (int64_t i = 0; i < k; ++i) {
      out[i * kStripe + j] = j < columns ? load(column[i * b.stride0]) : 0.0f;
    }
  }
}

static void product_pack(const CpuMatrix& b, int64_t k, int64_t n, float* packed, int64_t begin,
                         int64_t end) {
  for (int64_t stripe = begin; stripe < end; ++stripe) {
    if (b.dtype == DType::kFloat16) {
      product_pack_stripe<Half>(b, k, n, stripe, packed);
    } else {
      product_pack_stripe<float>(b, k, n, stripe, packed);
    }
  }
}

// Rows [row, row + rows) and columns [depth, depth + depths) of A as floats: row after row, or
// column after column where A lies so. block_gemm takes both, and a copy that turned them round
// would miss the cache at every element.
template <typename T>
static void product_copy_a(const CpuMatrix& a, int64_t row, int64_t rows, int64_t depth,
                           int64_t depths, float* out) {
  const T* data = static_cast<const T*>(a.data) + row * a.stride0 + depth * a.stride1;
  if (a.stride1 == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < depths; ++j) out[i * depths + j] = load(data[i * a.stride0 + j]);
    }
  } else {
    for (int64_t j = 0; j < depths; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        out[j * rows + i] = load(data[i * a.stride0 + j * a.stride1]);
      }
    }
  }
}

// One block of rows times the stripes [stripe_begin, stripe_end).
template <typename T>
static void product_block(const CpuProductParams& p, int64_t row, int64_t stripe_begin,
                          int64_t stripe_end, float* copy_of_a, float* sums) {
  const int64_t rows = std::min(kRowBlock, p.m - row);
  const int64_t width = (stripe_end - stripe_begin) * kStripe;
  const bool by_rows = p.a.stride1 == 1;
  for (int64_t depth = 0; depth < p.k; depth += kDepthBlock) {
    const int64_t depths = std::min(kDepthBlock, p.k - depth);
    const float* a = copy_of_a;
    int64_t row_stride = by_rows ? depths : 1;
    if (by_rows && std::is_same_v<T, float>) {
      a = static_cast<const float*>(p.a.data) + row * p.a.stride0 + depth;
      row_stride = p.a.stride0;
    } else {
      product_copy_a<T>(p.a, row, rows, depth, depths, copy_of_a);
    }
    for (int64_t stripe = stripe_begin; stripe < stripe_end; ++stripe) {
      block_gemm<float>(rows, kStripe, depths, a, row_stride, by_rows ? 1 : rows,
                        p.packed + (stripe * p.k + depth) * kStripe, kStripe,
                        sums + (stripe - stripe_begin) * kStripe, width, depth > 0);
    }
  }
  const int64_t first = stripe_begin * kStripe;
  const int64_t columns = std::min(width, p.n - first);
  for (int64_t i = 0; i < rows; ++i) {
    T* c = static_cast<T*>(p.c) + (row + i) * p.row_stride_c + first;
    const float* sum = sums + i * width;
    if (p.accumulate) {
      for (int64_t j = 0; j < columns; ++j) c[j] = store<T>(load(c[j]) + sum[j]);
    } else {
      for (int64_t j = 0; j < columns; ++j) c[j] = store<T>(sum[j]);
    }
  }
}

// Tasks [begin, end) of row blocks times `groups` groups of stripes.
static void product_tasks(const CpuProductParams& p, int64_t groups, int64_t begin, int64_t end) {
  const int64_t stripes = product_stripes(p.n);
  const int64_t per_group = (stripes + groups - 1) / groups;
  const int64_t block_rows = std::min(kRowBlock, p.m);
  const Scratch<float> copy_of_a(block_rows * std::min(kDepthBlock, p.k));
  const Scratch<float> sums(block_rows * per_group * kStripe);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / groups * kRowBlock;
    const int64_t stripe = task % groups * per_group;
    const int64_t stripe_end = std::min(stripe + per_group, stripes);
    if (stripe >= stripe_end) continue;
    if (p.a.dtype == DType::kFloat16) {
      product_block<Half>(p, row, stripe, stripe_end, copy_of_a.data(), sums.data());
    } else {
      product_block<float>(p, row, stripe, stripe_end, copy_of_a.data(), sums.data());
    }
  }
}
