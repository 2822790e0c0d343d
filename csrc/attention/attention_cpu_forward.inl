// Attention forward on the CPU: one task for each tile of queries of a head. Part of
// attention_cpu.inl.

// The online softmax: scores become exp(score - max), and what there is of the result is rescaled
// to the new maximum.
template <typename A>
static void softmax_step(int32_t other_rows, int32_t columns, A* scores, A* max, A* sum,
                         A* result) {
  constexpr int32_t kRows = kOwnRows<A>;
  alignas(64) A new_max[kRows], shift[kRows], factor[kRows];
  std::memcpy(new_max, max, sizeof(new_max));
  for (int32_t j = 0; j < other_rows; ++j) {
    const A* of_key = scores + j * kRows;
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i)
      new_max[i] = of_key[i] > new_max[i] ? of_key[i] : new_max[i];
  }
  bool changed = false;
#pragma omp simd reduction(| : changed)
  for (int32_t i = 0; i < kRows; ++i) {
    // A row without a key so far has no maximum: anything finite will do, its weights are 0.
    shift[i] = new_max[i] == kHiddenScore<A> ? A(0) : new_max[i];
    factor[i] = vector_exp(max[i] - shift[i]);
    sum[i] *= factor[i];
    changed |= factor[i] != A(1);
  }
  std::memcpy(max, new_max, sizeof(new_max));
  for (int32_t j = 0; j < other_rows; ++j) {
    A* of_key = scores + j * kRows;
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i) {
      of_key[i] = vector_exp(of_key[i] - shift[i]);
      sum[i] += of_key[i];
    }
  }
  if (!changed) return;
  for (int32_t d = 0; d < columns; ++d) {
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i) result[d * kRows + i] *= factor[i];
  }
}

template <typename T, typename A = Accumulator<T>>
static void forward_tasks(const AttentionForwardParams& p, int64_t begin, int64_t end) {
  constexpr int32_t kRows = kOwnRows<A>;
  const int32_t tiles = (p.seqlen_q + kRows - 1) / kRows;
  const int32_t group = p.num_heads / p.num_heads_kv;
  const Band band = visible_band(p);
  const Scratch<A> own(int64_t{p.head_dim} * kRows), scores(int64_t{kOtherRows} * kRows),
      result(int64_t{p.head_dim_v} * kRows), buffer(int64_t{kOtherRows} * kMaxHeadDim);
  alignas(64) A max[kRows], sum[kRows], row_scale[kRows];

  for (int64_t task = begin; task < end; ++task) {
    const int32_t own_row = static_cast<int32_t>(task % tiles) * kRows;
    const int32_t head = static_cast<int32_t>(task / tiles % p.num_heads);
    const int32_t batch = static_cast<int32_t>(task / tiles / p.num_heads);
    const int32_t rows = std::min(kRows, p.seqlen_q - own_row);
    const auto q = head_matrix<T>(p.q, p.q_strides, batch, head, p.head_dim);
    const auto k = head_matrix<T>(p.k, p.k_strides, batch, head / group, p.head_dim);
    const auto v = head_matrix<T>(p.v, p.v_strides, batch, head / group, p.head_dim_v);
    pack_transposed(q, own_row, rows, own.data());
    // Lanes beyond `rows` compute on what they find; start them clean so that it is cheap.
    std::fill_n(scores.data(), kOtherRows * kRows, A(0));
    std::fill_n(result.data(), int64_t{p.head_dim_v} * kRows, A(0));
    std::fill_n(max, kRows, kHiddenScore<A>);
    std::fill_n(sum, kRows, A(0));

    const Range keys = keys_seen_by(p, band, own_row, own_row + rows - 1);
    for (int32_t key = keys.begin; key < keys.end; key += kOtherRows) {
      const TilePlace<true> tile{batch, head, own_row,
                                 rows,  key,  std::min(kOtherRows, keys.end - key)};
      pair_products(tile_rows(k, key, tile.other_rows, buffer.data()), tile.other_rows, own.data(),
                    rows, p.head_dim, scores.data());
      final_scores<A>(p, band, tile, scores.data(), nullptr);
      softmax_step(tile.other_rows, p.head_dim_v, scores.data(), max, sum, result.data());
      multiply_by_dropout(p, tile, scores.data());
      accumulate(tile_rows(v, key, tile.other_rows, buffer.data()), tile.other_rows, scores.data(),
                 rows, p.head_dim_v, result.data());
    }

    const int64_t first = (int64_t{batch} * p.num_heads + head) * p.seqlen_q + own_row;
    for (int32_t i = 0; i < rows; ++i) {
      const RowEnd<A> row_end = end_row(p, head, max[i], sum[i]);
      row_scale[i] = row_end.scale;
      store_row_end(p, first + i, row_end);
    }
    T* out = static_cast<T*>(p.out) + batch * p.out_strides.batch + head * p.out_strides.head +
             own_row * p.out_strides.row;
    store_transposed(result.data(), row_scale, rows, p.head_dim_v, out, p.out_strides.row);
  }
}
