// The tile products of attention on the CPU. Part of attention_cpu.inl.

// pairs[j][i] = other[j] . own[i], where own holds lanes, or what is added to them. Long rows are
// added up in parts, which loses fewer digits.
template <typename E>
static void pair_products(const TileRows<E>& other, int32_t other_rows, const E* own,
                          int32_t own_rows, int32_t columns, ProductSum<E>* pairs,
                          bool adds = false) {
  constexpr int32_t kPart = 128;
  const int32_t elements = num_elements<E>(columns);
  for (int32_t first = 0; first < elements; first += kPart) {
    block_gemm<E>(other_rows, own_rows, std::min(kPart, elements - first), other.data + first,
                  other.row_stride, 1, own + first * kOwnRows<E>, kOwnRows<E>, pairs, kOwnRows<E>,
                  adds || first > 0);
  }
}

// result[d][i] += sum_j values[j][d] * weights[j][i].
template <typename E>
static void accumulate(const TileRows<E>& values, int32_t value_rows, const E* weights,
                       int32_t own_rows, int32_t columns, ProductSum<E>* result) {
  block_gemm<E>(columns, own_rows, num_elements<E>(value_rows), values.data, 1, values.row_stride,
                weights, kOwnRows<E>, result, kOwnRows<E>, true);
}

// result[j][d] += sum_i weights[j][i] * own[i][d].
template <typename E>
static void accumulate_rows(const TileRows<E>& weights, int32_t other_rows, const TileRows<E>& own,
                            int32_t own_rows, int32_t columns, ProductSum<E>* result) {
  block_gemm<E>(other_rows, columns, num_elements<E>(own_rows), weights.data, weights.row_stride, 1,
                own.data, own.row_stride, result, padded<E>(columns), true);
}

// row[d] = factor * from[d].
template <typename T, typename A>
static void store_row(const A* from, A factor, int32_t columns, T* row) {
#pragma omp simd
  for (int32_t d = 0; d < columns; ++d) row[d] = store<T>(from[d] * factor);
}

// result[i][d] = lanes[d * kOwnRows + i] * row_scale[i]; `buffer` holds a tile's rows.
template <typename T, typename A>
static void store_lanes(const A* lanes, const A* row_scale, int32_t rows, int32_t columns,
                        A* buffer, T* result, int64_t row_stride) {
  const int64_t stride = padded<A>(columns);
  transpose(lanes, kOwnRows<A>, columns, rows, buffer, stride);
  for (int32_t i = 0; i < rows; ++i) {
    store_row(buffer + i * stride, row_scale[i], columns, result + i * row_stride);
  }
}

// Where a tile of the score matrix lies. Lanes are its queries where queries own, else its keys.
template <bool kOwnsQueries>
struct TilePlace {
  const Sequence& sequence;
  int32_t head, own_row, own_rows, other_row, other_rows;

  int32_t row(int32_t lane, int32_t j) const {
    return kOwnsQueries ? own_row + lane : other_row + j;
  }
  int32_t column(int32_t lane, int32_t j) const {
    return kOwnsQueries ? other_row + j : own_row + lane;
  }
};
