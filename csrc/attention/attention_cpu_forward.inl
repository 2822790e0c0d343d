// Attention forward on the CPU: one task for some tiles of queries of a head, which a pass takes
// over the keys. Part of attention_cpu.inl.

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
  A* result;      // [the pass's result_columns][kOwnRows], of which Dv are the output's
  alignas(64) A max[kOwnRows<A>];
  alignas(64) A sum[kOwnRows<A>];
};

// The online softmax: scores become exp(score - max), and what there is of the result is rescaled
// to the new maximum. For the first kVectors vectors of lanes.
template <int32_t kVectors, typename A>
static void softmax_vectors(int32_t other_rows, int32_t columns, A* scores, A* max, A* sum,
                            A* result) {
  using Vector = typename VectorOf<A>::type;
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

// For as many vectors as have rows.
template <typename A>
static void softmax_step(int32_t own_rows, int32_t other_rows, int32_t columns, A* scores, A* max,
                         A* sum, A* result) {
  const auto vectors = [&](auto count) {
    softmax_vectors<decltype(count)::value>(other_rows, columns, scores, max, sum, result);
  };
  if (own_rows <= kLanes<A>) {
    vectors(std::integral_constant<int32_t, 1>{});
  } else if (own_rows <= 2 * kLanes<A>) {
    vectors(std::integral_constant<int32_t, 2>{});
  } else {
    vectors(std::integral_constant<int32_t, kOwnRows<A> / kLanes<A>>{});
  }
}

// Keys and values of a problem, or of its tangents, on their way into the products.
template <typename T>
struct KeyBuffers {
  using E = Operand<T>;

  explicit KeyBuffers(const AttentionProblem& p)
      : k(tile_size<E>(p.head_dim)),
        v(tile_size<E>(p.head_dim_v)),
        k_pages(p.maybe_block_table != nullptr ? kOtherRows * p.head_dim : 0),
        v_pages(p.maybe_block_table != nullptr ? kOtherRows * p.head_dim_v : 0) {}

  TileRows<E> load_k(const AttentionProblem& p, const Sequence& sequence, int32_t head_kv,
                     int32_t key, int32_t rows) const {
    return over_columns_often(
        cache_rows(p, p.k, p.k_strides, sequence, head_kv, p.head_dim, key, rows, k_pages.data()),
        0, rows, k.data());
  }
  TileRows<E> load_v(const AttentionProblem& p, const Sequence& sequence, int32_t head_kv,
                     int32_t key, int32_t rows) const {
    return over_rows(
        cache_rows(p, p.v, p.v_strides, sequence, head_kv, p.head_dim_v, key, rows, v_pages.data()),
        0, rows, v.data());
  }
  // Of a problem's queries, by way of the room for its keys.
  void pack_queries(const AttentionProblem& p, const Sequence& sequence, int32_t head, int32_t row,
                    int32_t rows, E* lanes) const {
    const auto q = query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim);
    pack_lanes(over_columns(q, row, rows, k.data()), rows, num_elements<E>(p.head_dim), lanes);
  }

  const Scratch<E> k, v;
  const Scratch<T> k_pages, v_pages;
};

// Writes the results of a tile, and how each row ended.
template <typename T, typename A = Accumulator<T>>
static void finish_tile(const AttentionForwardParams& p, const Sequence& sequence, int32_t head,
                        const QueryTile<T>& tile, A* buffer, RowEnd<A>* ends) {
  const int64_t first = row_of_all(p, sequence, head, tile.row);
  A row_scale[kOwnRows<A>];
  for (int32_t i = 0; i < tile.rows; ++i) {
    ends[i] = end_row(p, head, tile.max[i], tile.sum[i]);
    row_scale[i] = ends[i].scale;
    store_row_end(p, first + i, ends[i]);
  }
  T* out = query_rows(static_cast<T*>(p.out), p.out_strides, sequence, head);
  store_lanes(tile.result, row_scale, tile.rows, p.head_dim_v, buffer,
              out + tile.row * p.out_strides.row, p.out_strides.row);
}

// What a thread works on, and what it does with a tile of queries and one of keys.
template <typename T>
struct ForwardPass {
  using Element = T;
  using Params = AttentionForwardParams;
  using A = Accumulator<T>;
  using E = Operand<T>;

  ForwardPass(const Params& params, int32_t num_tiles)
      : p(params),
        keys(p),
        q_lanes(num_tiles * q_size(p)),
        weights(kOtherRows * kOwnRows<A>),
        scores(kOtherRows * kOwnRows<A>),
        buffer(tile_size<A>(p.head_dim_v)) {
    std::fill_n(scores.data(), kOtherRows * kOwnRows<A>, A(0));
  }

  static int64_t q_size(const Params& p) {
    return int64_t{num_elements<E>(p.head_dim)} * kOwnRows<A>;
  }
  static int64_t result_columns(const Params& p) { return p.head_dim_v; }
  static bool leaves_out(const Sequence& sequence) { return is_decoded(sequence); }

  void begin(const Sequence& sequence, int32_t head, int32_t index, QueryTile<T>& tile) {
    tile.q = q_lanes.data() + index * q_size(p);
    keys.pack_queries(p, sequence, head, tile.row, tile.rows, tile.q);
  }
  void load(const Sequence& sequence, int32_t head_kv, int32_t key, int32_t rows) {
    k = keys.load_k(p, sequence, head_kv, key, rows);
    v = keys.load_v(p, sequence, head_kv, key, rows);
  }
  void step(const Band& band, const TilePlace<true>& place, QueryTile<T>& tile) {
    const int32_t rows = place.other_rows;
    const TileBlocks blocks = seen_blocks<A>(band, place);
    pair_products(k, tile.q, blocks, p.head_dim, scores.data());
    final_scores<A>(p, band, place, scores.data(), nullptr);
    softmax_step(tile.rows, rows, p.head_dim_v, scores.data(), tile.max, tile.sum, tile.result);
    multiply_by_dropout(p, place, scores.data());
    accumulate(v, weights_over_rows(scores.data(), rows, weights.data()), blocks, p.head_dim_v,
               tile.result);
  }
  void finish(const Sequence& sequence, int32_t head, const QueryTile<T>& tile) {
    RowEnd<A> ends[kOwnRows<A>];
    finish_tile(p, sequence, head, tile, buffer.data(), ends);
  }

  const Params& p;
  const KeyBuffers<T> keys;
  const Scratch<E> q_lanes, weights;
  const Scratch<A> scores, buffer;
  TileRows<E> k, v;
};

// Tiles of queries that a task takes over the keys together, to read and pack those once: as many
// as leave a few tasks for each thread. No row's result depends on it.
constexpr int32_t kTilesOfTask = 8;
static inline int32_t tiles_of_task(int64_t all_tiles) {
  return static_cast<int32_t>(
      std::clamp<int64_t>(all_tiles / (4 * num_threads()), 1, kTilesOfTask));
}

template <typename Pass>
static void query_tasks(const typename Pass::Params& p, int32_t num_tiles, int64_t begin,
                        int64_t end) {
  using T = typename Pass::Element;
  using A = Accumulator<T>;
  constexpr int32_t kRows = kOwnRows<A>;
  const int64_t result_size = Pass::result_columns(p) * kRows;
  const Scratch<A> results(num_tiles * result_size);
  Pass pass(p, num_tiles);

  for (int64_t task = begin; task < end; ++task) {
    const auto [sequence, head, first_row] = task_place(p, true, num_tiles * kRows, task);
    if (first_row >= sequence.seqlen_q || Pass::leaves_out(sequence)) continue;
    const Band band = visible_band(p, sequence);

    QueryTile<T> tiles[kTilesOfTask]{};
    int32_t count = 0;
    for (int32_t row = first_row; count < num_tiles && row < sequence.seqlen_q; row += kRows) {
      QueryTile<T>& tile = tiles[count];
      tile.row = row;
      tile.rows = std::min(kRows, sequence.seqlen_q - row);
      tile.keys = keys_seen_by(sequence, band, row, row + tile.rows - 1);
      tile.result = results.data() + count * result_size;
      std::fill_n(tile.result, result_size, A(0));
      std::fill_n(tile.max, kRows, kHiddenScore<A>);
      std::fill_n(tile.sum, kRows, A(0));
      pass.begin(sequence, head, count, tile);
      ++count;
    }

    // The rows of the last tile see the last keys.
    const Range keys{tiles[0].keys.begin / kOtherRows * kOtherRows, tiles[count - 1].keys.end};
    for (int32_t key = keys.begin; key < keys.end; key += kOtherRows) {
      bool loaded = false;
      for (int32_t t = 0; t < count; ++t) {
        if (key >= tiles[t].keys.end || key + kOtherRows <= tiles[t].keys.begin) continue;
        const TilePlace<true> place = tiles[t].place(sequence, head, key);
        if (mask_hides<A>(p.mask, place)) continue;
        if (!loaded) {
          pass.load(sequence, key_head(p, head), key,
                    std::min(kOtherRows, sequence.seqlen_k - key));
        }
        loaded = true;
        pass.step(band, place, tiles[t]);
      }
    }
    for (int32_t t = 0; t < count; ++t) pass.finish(sequence, head, tiles[t]);
  }
}

template <typename Pass>
static void run_query_tasks(const typename Pass::Params& p) {
  using A = Accumulator<typename Pass::Element>;
  const int64_t heads = int64_t{p.batch} * p.num_heads;
  const int32_t tiles = tiles_of_task(heads * num_tiles<A>(p.seqlen_q));
  parallel_for(0, num_tasks(p, true, tiles * kOwnRows<A>), 1,
               [&](int64_t begin, int64_t end) { query_tasks<Pass>(p, tiles, begin, end); });
}
