// Attention forward on the CPU: one task for some tiles of queries of a head. Part of
// attention_cpu.inl.

// A tile of queries on its way over the keys.
template <typename T>
struct QueryTile {
  using A = Accumulator<T>;

  TilePlace<true> place(const Sequence& sequence, int32_t head, int32_t key) const {
    return {sequence, head, row, rows, key, std::min(kOtherRows, keys.end - key)};
  }

  int32_t row, rows;
  Range keys;
  Operand<T>* q;  // lanes
  A* result;      // [Dv][kOwnRows]
  alignas(64) A max[kOwnRows<A>];
  alignas(64) A sum[kOwnRows<A>];
};

// The online softmax: scores become exp(score - max), and what there is of the result is rescaled
// to the new maximum.
template <typename A>
static void softmax_step(int32_t other_rows, int32_t columns, A* scores, A* max, A* sum,
                         A* result) {
  using Vector = typename VectorOf<A>::type;
  constexpr int32_t kVectors = kOwnRows<A> / kLanes<A>;
  Vector* const maxima = reinterpret_cast<Vector*>(max);
  Vector* const sums = reinterpret_cast<Vector*>(sum);
  Vector new_max[kVectors], new_sum[kVectors], shift[kVectors], factor[kVectors];
#pragma GCC unroll 8
  for (int32_t v = 0; v < kVectors; ++v) new_max[v] = maxima[v];
  for (int32_t j = 0; j < other_rows; ++j) {
    const Vector* of_key = reinterpret_cast<const Vector*>(scores + j * kOwnRows<A>);
#pragma GCC unroll 8
    for (int32_t v = 0; v < kVectors; ++v) {
      new_max[v] = of_key[v] > new_max[v] ? of_key[v] : new_max[v];
    }
  }
  decltype(new_max[0] != new_max[0]) moved{};
  for (int32_t v = 0; v < kVectors; ++v) {
    // A row without a key so far has no maximum: anything finite will do, its weights are 0.
    shift[v] = new_max[v] == kHiddenScore<A> ? Vector{} : new_max[v];
    factor[v] = softmax_exp(maxima[v] - shift[v]);
    maxima[v] = new_max[v];
    new_sum[v] = sums[v] * factor[v];
    moved |= factor[v] != 1;
  }
  for (int32_t j = 0; j < other_rows; ++j) {
    Vector* of_key = reinterpret_cast<Vector*>(scores + j * kOwnRows<A>);
#pragma GCC unroll 8
    for (int32_t v = 0; v < kVectors; ++v) {
      of_key[v] = softmax_exp(of_key[v] - shift[v]);
      new_sum[v] += of_key[v];
    }
  }
  for (int32_t v = 0; v < kVectors; ++v) sums[v] = new_sum[v];
  bool changed = false;
  for (int32_t i = 0; i < kLanes<A>; ++i) changed |= moved[i] != 0;
  if (!changed) return;
  for (int32_t d = 0; d < columns; ++d) {
    Vector* of_column = reinterpret_cast<Vector*>(result + d * kOwnRows<A>);
    for (int32_t v = 0; v < kVectors; ++v) of_column[v] *= factor[v];
  }
}

// Takes a tile of keys into a tile of queries.
template <typename T, typename E = Operand<T>, typename A = Accumulator<T>>
static void forward_step(const AttentionForwardParams& p, const Band& band,
                         const TilePlace<true>& place, const TileRows<E>& k, const TileRows<E>& v,
                         QueryTile<T>& tile, A* mask, A* scores, E* weights) {
  pair_products(k, place.other_rows, tile.q, tile.rows, p.head_dim, scores);
  final_scores<A>(p, band, place, mask, scores, nullptr);
  softmax_step(place.other_rows, p.head_dim_v, scores, tile.max, tile.sum, tile.result);
  multiply_by_dropout(p, place, scores);
  accumulate(v, place.other_rows, weights_over_rows(scores, place.other_rows, weights), tile.rows,
             p.head_dim_v, tile.result);
}

template <typename T, typename A = Accumulator<T>>
static void finish_tile(const AttentionForwardParams& p, const Sequence& sequence, int32_t head,
                        const QueryTile<T>& tile, A* buffer) {
  const int64_t first = row_of_all(p, sequence, head, tile.row);
  A row_scale[kOwnRows<A>];
  for (int32_t i = 0; i < tile.rows; ++i) {
    const RowEnd<A> row_end = end_row(p, head, tile.max[i], tile.sum[i]);
    row_scale[i] = row_end.scale;
    store_row_end(p, first + i, row_end);
  }
  T* out = query_rows(static_cast<T*>(p.out), p.out_strides, sequence, head);
  store_lanes(tile.result, row_scale, tile.rows, p.head_dim_v, buffer,
              out + tile.row * p.out_strides.row, p.out_strides.row);
}

// Tiles of queries that a task takes over the keys together, to read and pack those once: as many
// as leave a few tasks for each thread. No row's result depends on it.
constexpr int32_t kTilesOfTask = 8;
static inline int32_t tiles_of_task(int64_t all_tiles) {
  return static_cast<int32_t>(
      std::clamp<int64_t>(all_tiles / (4 * num_threads()), 1, kTilesOfTask));
}

template <typename T, typename A = Accumulator<T>>
static void forward_tasks(const AttentionForwardParams& p, int32_t num_tiles, int64_t begin,
                          int64_t end) {
  using E = Operand<T>;
  constexpr int32_t kRows = kOwnRows<A>;
  const int32_t task_rows = num_tiles * kRows;
  const int32_t group = p.num_heads / p.num_heads_kv;
  const int64_t q_size = int64_t{num_elements<E>(p.head_dim)} * kRows;
  const int64_t result_size = int64_t{p.head_dim_v} * kRows;
  const Scratch<E> q_lanes(num_tiles * q_size), k_buffer(tile_size<E>(p.head_dim)),
      v_buffer(tile_size<E>(p.head_dim_v)), weights(kOtherRows * kRows);
  const Scratch<A> results(num_tiles * result_size), scores(kOtherRows * kRows),
      out_buffer(tile_size<A>(p.head_dim_v)), mask = mask_buffer<A>(p);
  const int64_t page_rows = p.maybe_block_table != nullptr ? kOtherRows : 0;
  const Scratch<T> k_pages(page_rows * p.head_dim), v_pages(page_rows * p.head_dim_v);
  std::fill_n(scores.data(), kOtherRows * kRows, A(0));

  for (int64_t task = begin; task < end; ++task) {
    const auto [sequence, head, first_row] = task_place(p, true, task_rows, task);
    if (first_row >= sequence.seqlen_q || has_few_queries(sequence)) continue;
    const Band band = visible_band(p, sequence);
    const auto q = query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim);

    QueryTile<T> tiles[kTilesOfTask]{};
    int32_t count = 0;
    for (int32_t row = first_row; count < num_tiles && row < sequence.seqlen_q; row += kRows) {
      QueryTile<T>& tile = tiles[count];
      tile.row = row;
      tile.rows = std::min(kRows, sequence.seqlen_q - row);
      tile.keys = keys_seen_by(sequence, band, row, row + tile.rows - 1);
      tile.q = q_lanes.data() + count * q_size;
      tile.result = results.data() + count * result_size;
      pack_lanes(over_columns(q, row, tile.rows, k_buffer.data()), tile.rows,
                 num_elements<E>(p.head_dim), tile.q);
      std::fill_n(tile.result, result_size, A(0));
      std::fill_n(tile.max, kRows, kHiddenScore<A>);
      std::fill_n(tile.sum, kRows, A(0));
      ++count;
    }

    // The rows of the last tile see the last keys.
    const Range keys{tiles[0].keys.begin / kOtherRows * kOtherRows, tiles[count - 1].keys.end};
    for (int32_t key = keys.begin; key < keys.end; key += kOtherRows) {
      const int32_t rows = std::min(kOtherRows, sequence.seqlen_k - key);
      const auto k = cache_rows(p, p.k, p.k_strides, sequence, head / group, p.head_dim, key, rows,
                                k_pages.data());
      const auto v = cache_rows(p, p.v, p.v_strides, sequence, head / group, p.head_dim_v, key,
                                rows, v_pages.data());
      const auto k_rows = over_columns(k, 0, rows, k_buffer.data());
      const auto v_rows = over_rows(v, 0, rows, v_buffer.data());
      for (int32_t t = 0; t < count; ++t) {
        if (key >= tiles[t].keys.end || key + kOtherRows <= tiles[t].keys.begin) continue;
        forward_step(p, band, tiles[t].place(sequence, head, key), k_rows, v_rows, tiles[t],
                     mask.data(), scores.data(), weights.data());
      }
    }
    for (int32_t t = 0; t < count; ++t) finish_tile(p, sequence, head, tiles[t], out_buffer.data());
  }
}
