// The tile products of attention on the CPU. Part of attention_cpu.inl.

// One head of a [B, H, S, D] tensor.
template <typename T>
struct HeadMatrix {
  const T* data;
  int64_t row_stride;
  int32_t columns;
};

template <typename T>
static HeadMatrix<T> head_matrix(const void* data, const HeadStrides& strides, int64_t batch,
                                 int64_t head, int32_t columns) {
  return {static_cast<const T*>(data) + batch * strides.batch + head * strides.head, strides.row,
          columns};
}

// packed[d * kOwnRows + i] = matrix[row + i][d]; lanes beyond `rows` are zero.
template <typename T, typename A>
static void pack_transposed(const HeadMatrix<T>& matrix, int32_t row, int32_t rows, A* packed) {
  constexpr int32_t kRows = kOwnRows<A>;
  for (int32_t i = 0; i < rows; ++i) {
    const T* source = matrix.data + (row + i) * matrix.row_stride;
    for (int32_t d = 0; d < matrix.columns; ++d) packed[d * kRows + i] = load(source[d]);
  }
  for (int32_t i = rows; i < padded<A>(rows); ++i) {
    for (int32_t d = 0; d < matrix.columns; ++d) packed[d * kRows + i] = 0;
  }
}

// result[i][d] = packed[d * kOwnRows + i] * row_scale[i].
template <typename T, typename A>
static void store_transposed(const A* packed, const A* row_scale, int32_t rows, int32_t columns,
                             T* result, int64_t row_stride) {
  for (int32_t i = 0; i < rows; ++i) {
    T* target = result + i * row_stride;
    for (int32_t d = 0; d < columns; ++d) {
      target[d] = store<T>(packed[d * kOwnRows<A> + i] * row_scale[i]);
    }
  }
}

// Rows of an operand in the accumulator's type: where they lie, or converted into a buffer.
template <typename A>
struct TileRows {
  const A* data;
  int64_t row_stride;
};

template <typename T, typename A>
static TileRows<A> tile_rows(const HeadMatrix<T>& matrix, int32_t row, int32_t rows, A* buffer) {
  const T* source = matrix.data + row * matrix.row_stride;
  if constexpr (std::is_same_v<T, A>) {
    return {source, matrix.row_stride};
  } else {
    for (int32_t j = 0; j < rows; ++j) {
      const T* from = source + j * matrix.row_stride;
      A* to = buffer + static_cast<int64_t>(j) * matrix.columns;
#pragma omp simd
      for (int32_t d = 0; d < matrix.columns; ++d) to[d] = load(from[d]);
    }
    return {buffer, matrix.columns};
  }
}

// pairs[j][i] = other[j] . own[i].
template <typename A>
static void pair_products(const TileRows<A>& other, int32_t other_rows, const A* own,
                          int32_t own_rows, int32_t depth, A* pairs) {
  block_gemm<A>(other_rows, own_rows, depth, other.data, other.row_stride, 1, own, kOwnRows<A>,
                pairs, kOwnRows<A>, false);
}

// result[d][i] += sum_j values[j][d] * weights[j][i].
template <typename A>
static void accumulate(const TileRows<A>& values, int32_t value_rows, const A* weights,
                       int32_t own_rows, int32_t columns, A* result) {
  block_gemm<A>(columns, own_rows, value_rows, values.data, 1, values.row_stride, weights,
                kOwnRows<A>, result, kOwnRows<A>, true);
}

// Where a tile of the score matrix lies. Lanes are its queries where queries own, else its keys.
template <bool kOwnsQueries>
struct TilePlace {
  int32_t batch, head, own_row, own_rows, other_row, other_rows;

  int32_t row(int32_t lane, int32_t j) const {
    return kOwnsQueries ? own_row + lane : other_row + j;
  }
  int32_t column(int32_t lane, int32_t j) const {
    return kOwnsQueries ? other_row + j : own_row + lane;
  }
};
