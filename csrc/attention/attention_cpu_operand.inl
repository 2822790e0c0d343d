// What the tile products of attention on the CPU multiply: rows of tensors and tiles of weights, as
// numbers in the accumulator's type, or as pairs of bfloat16 where the CPU multiplies those. Part
// of attention_cpu.inl.

// One head of a [B, H, S, D] tensor.
template <typename T>
struct HeadMatrix {
  const T* data;
  int64_t row_stride;
  int32_t columns;

  const T* row(int64_t index) const { return data + index * row_stride; }
};

template <typename T>
static HeadMatrix<T> head_matrix(const void* data, const HeadStrides& strides, int64_t batch,
                                 int64_t head, int32_t columns) {
  return {static_cast<const T*>(data) + batch * strides.batch + head * strides.head, strides.row,
          columns};
}

// The rows of a sequence in one head.
template <typename T>
static HeadMatrix<T> query_matrix(const void* data, const HeadStrides& strides,
                                  const Sequence& sequence, int64_t head, int32_t columns) {
  return {query_rows(static_cast<const T*>(data), strides, sequence, head), strides.row, columns};
}
template <typename T>
static HeadMatrix<T> key_matrix(const void* data, const HeadStrides& strides,
                                const Sequence& sequence, int64_t head, int32_t columns) {
  return {key_rows(static_cast<const T*>(data), strides, sequence, head), strides.row, columns};
}

// Rows row .. of a sequence's keys or values, as a matrix that begins with them: where they lie, or
// collected from the pages of a cache.
template <typename T>
static HeadMatrix<T> cache_rows(const AttentionProblem& p, const void* data,
                                const HeadStrides& strides, const Sequence& sequence, int64_t head,
                                int32_t columns, int32_t row, int32_t rows, T* page_buffer) {
  if (p.maybe_block_table == nullptr) {
    const auto matrix = key_matrix<T>(data, strides, sequence, head, columns);
    return {matrix.row(row), matrix.row_stride, columns};
  }
  const int32_t* pages =
      p.maybe_block_table + static_cast<int64_t>(sequence.index) * p.pages_of_sequence;
  for (int32_t j = 0; j < rows; ++j) {
    const T* from = static_cast<const T*>(data) + pages[(row + j) / p.page_size] * strides.batch +
                    head * strides.head + (row + j) % p.page_size * strides.row;
    std::copy_n(from, columns, page_buffer + int64_t{j} * columns);
  }
  return {page_buffer, columns, columns};
}

// Rows of elements, each readable in whole vectors.
template <typename E>
struct TileRows {
  const E* data;
  int64_t row_stride;
};

// Room for kOtherRows or kOwnRows rows of a matrix in either of the two forms below.
template <typename E>
static int64_t tile_size(int32_t columns) {
  return std::max<int64_t>(kOtherRows, kOwnRows<E>) * padded<E>(columns);
}

template <typename T, typename E>
static void copy_row(const T* from, int32_t columns, int64_t to_columns, E* to) {
#pragma omp simd
  for (int32_t d = 0; d < columns; ++d) to[d] = load(from[d]);
  for (int64_t d = columns; d < to_columns; ++d) to[d] = 0;
}
#if FUSED_BFLOAT16_PAIRS
static inline void copy_row(const BFloat16* from, int32_t columns, int64_t to_columns, Pair* to) {
  std::memset(to + columns / 2, 0, (to_columns - columns / 2) * sizeof(Pair));
  std::memcpy(to, from, columns * sizeof(BFloat16));
}
#endif

// Rows for a product that sums over their columns: where they lie, or copied, zeros behind the
// last.
template <typename T, typename E>
static TileRows<E> over_columns(const HeadMatrix<T>& matrix, int32_t row, int32_t rows, E* buffer) {
  if constexpr (sizeof(E) == kSteps<E> * sizeof(T)) {
    if (matrix.columns % (kSteps<E> * kLanes<E>) == 0 && matrix.row_stride % kSteps<E> == 0) {
      return {reinterpret_cast<const E*>(matrix.row(row)), matrix.row_stride / kSteps<E>};
    }
  }
  const int64_t stride = padded<E>(num_elements<E>(matrix.columns));
  for (int32_t j = 0; j < rows; ++j) {
    copy_row(matrix.row(row + j), matrix.columns, stride, buffer + j * stride);
  }
  return {buffer, stride};
}

// The same rows for a product that sums over them: side by side even if the tensor's are far apart,
// where only a few at a time would find room in the cache.
template <typename T, typename E>
static TileRows<E> over_rows(const HeadMatrix<T>& matrix, int32_t row, int32_t rows, E* buffer) {
  const int64_t stride = padded<E>(matrix.columns);
  if constexpr (std::is_same_v<T, E>) {
    const bool whole = matrix.columns == stride;  // rows that may be read in whole vectors
    if (whole && matrix.row_stride == stride) return {matrix.row(row), stride};
  }
  for (int32_t j = 0; j < rows; ++j) {
    copy_row(matrix.row(row + j), matrix.columns, stride, buffer + j * stride);
  }
  return {buffer, stride};
}
#if FUSED_BFLOAT16_PAIRS
static inline TileRows<Pair> over_rows(const HeadMatrix<BFloat16>& matrix, int32_t row,
                                       int32_t rows, Pair* buffer) {
  const int64_t stride = padded<Pair>(matrix.columns);
  for (int32_t j = 0; j < rows; j += 2) {
    const BFloat16 *low = matrix.row(row + j),
                   *maybe_high = j + 1 < rows ? low + matrix.row_stride : nullptr;
    Pair* to = buffer + j / 2 * stride;
    join_pairs(low, maybe_high, 1, matrix.columns, to, 1);
    std::memset(to + matrix.columns, 0, (stride - matrix.columns) * sizeof(Pair));
  }
  return {buffer, stride};
}
#endif

// Rows for many products that sum over their columns: side by side too.
template <typename T, typename E>
static TileRows<E> over_columns_often(const HeadMatrix<T>& matrix, int32_t row, int32_t rows,
                                      E* buffer) {
  if constexpr (kSteps<E> == 1) {
    return over_rows(matrix, row, rows, buffer);
  } else {
    return over_columns(matrix, row, rows, buffer);
  }
}

// Rows for products of either kind: numbers have one form for both, pairs one for each.
template <typename E>
struct TileForms {
  TileRows<E> over_columns, over_rows;
};
template <typename T, typename E>
static TileForms<E> over_both(const HeadMatrix<T>& matrix, int32_t row, int32_t rows,
                              E* columns_buffer, E* rows_buffer) {
  const TileRows<E> form = over_rows(matrix, row, rows, rows_buffer);
  if constexpr (kSteps<E> == 1) {
    return {form, form};
  } else {
    return {over_columns(matrix, row, rows, columns_buffer), form};
  }
}

// The lanes of a product: packed[d * kOwnRows + i] = rows[i][d]. Whole vectors of rows and columns
// are written, those behind the last row as zeros.
template <typename E>
static void pack_lanes(const TileRows<E>& rows, int32_t num_rows, int32_t columns, E* packed) {
  transpose(rows.data, rows.row_stride, num_rows, columns, packed, kOwnRows<E>);
}

// A tile of weights [rows][kOwnRows] for a product that sums over its rows.
template <typename A>
static const A* weights_over_rows(const A* weights, int32_t, A*) {
  return weights;
}
// And for one that sums over its lanes, of which those behind the last are zero.
template <typename A>
static TileRows<A> weights_over_lanes(const A* weights, int32_t, A*) {
  return {weights, kOwnRows<A>};
}
#if FUSED_BFLOAT16_PAIRS
static inline const Pair* weights_over_rows(const float* weights, int32_t rows, Pair* buffer) {
  alignas(64) const float zeros[kOwnRows<float>] = {};
  for (int32_t j = 0; j < rows; j += 2) {
    const float* low = weights + j * kOwnRows<float>;
    const float* high = j + 1 < rows ? low + kOwnRows<float> : zeros;
    for (int32_t i = 0; i < kOwnRows<float>; i += 16) {
      store_pairs(low + i, high + i, buffer + j / 2 * kOwnRows<float> + i);
    }
  }
  return buffer;
}
static inline TileRows<Pair> weights_over_lanes(const float* weights, int32_t rows, Pair* buffer) {
  for (int32_t i = 0; i < rows * kOwnRows<float>; i += 32) {
    store_neighbours(weights + i, buffer + i / 2);
  }
  return {buffer, kOwnRows<float> / 2};
}
#endif
