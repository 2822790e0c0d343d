// The gradients that the scores themselves have on the CPU: of an additive mask, of ALiBi slopes,
// and of the sink. Part of attention_cpu.inl.

// What a task has of `extent` tiles or heads: one of them, or all, to sum over.
static inline Range take_share(int64_t stride, int32_t extent, int64_t& index) {
  if (stride == 0) return {0, extent};
  const int32_t place = static_cast<int32_t>(index % extent);
  index /= extent;
  return {place, place + 1};
}

static inline int32_t tiles_in(int32_t length, int32_t tile) { return (length + tile - 1) / tile; }

// What a task adds up, as far as the sequences have it.
struct Shares {
  Range key_tiles, row_tiles, heads, sequences;
};

// Adds a tile of ds to the sums, or of what it says about the slopes.
template <typename A>
static void add_tile(const AttentionProblem& p, const Band& band, const TilePlace<true>& tile,
                     bool by_distance, const A* gradients, A* sums) {
  int32_t nearest[kOwnRows<A>];
  for (int32_t i = 0; by_distance && i < tile.own_rows; ++i) {
    nearest[i] = nearest_distance(p, tile.sequence, band, tile.own_row + i);
  }
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    const A* from = gradients + j * kOwnRows<A>;
    A* to = sums + j * kOwnRows<A>;
    if (by_distance) {
#pragma omp simd
      for (int32_t i = 0; i < tile.own_rows; ++i) {
        const int32_t distance = alibi_distance(tile.sequence, tile.row(i, j), tile.column(i, j));
        to[i] -= from[i] * static_cast<A>(distance - nearest[i]);
      }
    } else {
#pragma omp simd
      for (int32_t i = 0; i < tile.own_rows; ++i) to[i] += from[i];
    }
  }
}

// Writes rows by columns of sums, summed over the dimensions that the gradient does not have. In
// double: a sum over many pairs is far smaller than its terms.
template <typename A>
static void store_sums(const ScoreGradient& gradient, const A* sums, int32_t rows, int32_t columns,
                       A* target) {
  constexpr int32_t kRows = kOwnRows<A>;
  const bool over_rows = gradient.row_stride == 0, over_columns = gradient.column_stride == 0;
  for (int32_t j = 0; j < (over_columns ? 1 : columns); ++j) {
    double total[kRows] = {};
    for (int32_t from = j; from < (over_columns ? columns : j + 1); ++from) {
#pragma omp simd
      for (int32_t i = 0; i < rows; ++i) total[i] += static_cast<double>(sums[from * kRows + i]);
    }
    for (int32_t i = 1; over_rows && i < rows; ++i) total[0] += total[i];
    A* column = target + j * gradient.column_stride;
    for (int32_t i = 0; i < (over_rows ? 1 : rows); ++i) {
      column[i * gradient.row_stride] = static_cast<A>(total[i]);
    }
  }
}

// The sums of a share's tiles, in the order of sequences, heads, rows and keys.
template <typename T, typename A = Accumulator<T>>
class ScoreGradientSums {
  using E = Operand<T>;

 public:
  explicit ScoreGradientSums(const AttentionBackwardParams& params)
      : p(params),
        own(int64_t{num_elements<E>(p.head_dim)} * kRows),
        own_v(int64_t{num_elements<E>(p.head_dim_v)} * kRows),
        buffer(tile_size<E>(p.head_dim)),
        buffer_v(tile_size<E>(p.head_dim_v)),
        weights(p),
        sums(kTile) {}

  A* add(const Shares& shares, bool by_distance) {
    std::fill_n(sums.data(), kTile, A(0));
    for (int32_t index = shares.sequences.begin; index < shares.sequences.end; ++index) {
      const Sequence sequence = sequence_of(p, index);
      for (int32_t head = shares.heads.begin; head < shares.heads.end; ++head) {
        add_head(shares, sequence, head, by_distance);
      }
    }
    return sums.data();
  }

 private:
  static constexpr int32_t kRows = kOwnRows<A>, kTile = kOtherRows * kRows;

  void add_head(const Shares& shares, const Sequence& sequence, int32_t head, bool by_distance) {
    const int32_t head_kv = key_head(p, head);
    const Band band = visible_band(p, sequence);
    const auto q = query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim);
    const auto k = key_matrix<T>(p.k, p.k_strides, sequence, head_kv, p.head_dim);
    const auto v = key_matrix<T>(p.v, p.v_strides, sequence, head_kv, p.head_dim_v);
    const auto grad_out =
        query_matrix<T>(p.grad_out, p.grad_out_strides, sequence, head, p.head_dim_v);
    const int32_t row_end = std::min(shares.row_tiles.end, tiles_in(sequence.seqlen_q, kRows));
    const int32_t key_end = std::min(shares.key_tiles.end, tiles_in(sequence.seqlen_k, kOtherRows));
    for (int32_t row_tile = shares.row_tiles.begin; row_tile < row_end; ++row_tile) {
      const int32_t row = row_tile * kRows, rows = std::min(kRows, sequence.seqlen_q - row);
      const Range keys = keys_seen_by(sequence, band, row, row + rows - 1);
      pack_lanes(over_columns(q, row, rows, buffer.data()), rows, num_elements<E>(p.head_dim),
                 own.data());
      pack_lanes(over_columns(grad_out, row, rows, buffer_v.data()), rows,
                 num_elements<E>(p.head_dim_v), own_v.data());
      for (int32_t key_tile = shares.key_tiles.begin; key_tile < key_end; ++key_tile) {
        const int32_t key = key_tile * kOtherRows;
        if (key >= keys.end || key + kOtherRows <= keys.begin) continue;
        const TilePlace<true> tile{sequence, head, row,
                                   rows,     key,  std::min(kOtherRows, sequence.seqlen_k - key)};
        if (mask_hides<A>(p.mask, tile)) continue;
        tile_weights(p, band, tile, seen_blocks<A>(band, tile),
                     over_columns(k, key, tile.other_rows, buffer.data()),
                     over_columns(v, key, tile.other_rows, buffer_v.data()), own.data(),
                     own_v.data(), weights);
        add_tile(p, band, tile, by_distance, weights.dots.data(), sums.data());
      }
    }
  }

  const AttentionBackwardParams& p;
  const Scratch<E> own, own_v, buffer, buffer_v;
  const WeightsTile<A> weights;
  const Scratch<A> sums;
};

// One task for each tile of the mask's gradient, which sums over what the mask is broadcast over.
template <typename T, typename A = Accumulator<T>>
static void mask_gradient(const AttentionBackwardParams& p) {
  const ScoreGradient& gradient = p.maybe_grad_mask;
  constexpr int32_t kRows = kOwnRows<A>;
  const int32_t row_tiles = tiles_in(p.mask.rows, kRows);
  const int32_t key_tiles = tiles_in(p.mask.columns, kOtherRows);
  const int64_t tasks = (gradient.batch_stride ? int64_t{p.num_sequences} : 1) *
                        (gradient.head_stride ? p.num_heads : 1) *
                        (gradient.row_stride ? row_tiles : 1) *
                        (gradient.column_stride ? key_tiles : 1);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    ScoreGradientSums<T> sums(p);
    for (int64_t task = begin; task < end; ++task) {
      int64_t index = task;
      Shares shares;
      shares.key_tiles = take_share(gradient.column_stride, key_tiles, index);
      shares.row_tiles = take_share(gradient.row_stride, row_tiles, index);
      shares.heads = take_share(gradient.head_stride, p.num_heads, index);
      shares.sequences = take_share(gradient.batch_stride, p.num_sequences, index);
      const int32_t row = shares.row_tiles.begin * kRows;
      const int32_t key = shares.key_tiles.begin * kOtherRows;
      A* target = static_cast<A*>(gradient.data) + shares.sequences.begin * gradient.batch_stride +
                  shares.heads.begin * gradient.head_stride + row * gradient.row_stride +
                  key * gradient.column_stride;
      store_sums(gradient, sums.add(shares, false), std::min(kRows, p.mask.rows - row),
                 std::min(kOtherRows, p.mask.columns - key), target);
    }
  });
}

// What each row gives to the gradient of its head's ALiBi slope.
template <typename T, typename A = Accumulator<T>>
static void row_alibi(const AttentionBackwardParams& p) {
  const ScoreGradient of_rows{nullptr, 0, 0, 1, 0, nullptr};
  parallel_for(0, num_tasks(p, true, kOwnRows<A>), 1, [&](int64_t begin, int64_t end) {
    ScoreGradientSums<T> sums(p);
    for (int64_t task = begin; task < end; ++task) {
      const auto [sequence, head, row] = task_place(p, true, kOwnRows<A>, task);
      const int32_t rows = std::min(kOwnRows<A>, sequence.seqlen_q - row);
      if (rows <= 0) continue;
      const int32_t tile = row / kOwnRows<A>;
      const Shares shares{{0, kMaxLength},
                          {tile, tile + 1},
                          {head, head + 1},
                          {sequence.index, sequence.index + 1}};
      store_sums(of_rows, sums.add(shares, true), rows, kOtherRows,
                 static_cast<A*>(p.maybe_row_alibi) + row_of_all(p, sequence, head, row));
    }
  });
}

// The gradients of the slopes and of the sink, from what each row gives to them.
template <typename A>
static void head_sums(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  for (int32_t head = static_cast<int32_t>(begin); head < end; ++head) {
    CompensatedSum<double> alibi, sink;
    for (int32_t index = 0; index < p.num_sequences; ++index) {
      const Sequence sequence = sequence_of(p, index);
      const Band band = visible_band(p, sequence);
      for (int32_t row = 0; row < sequence.seqlen_q; ++row) {
        const HeadGradients of_row = head_gradients<A>(p, sequence, band, head, row);
        alibi.add(of_row.alibi);
        sink.add(of_row.sink);
      }
    }
    if (p.maybe_row_alibi) {
      static_cast<A*>(p.maybe_grad_alibi_slopes)[head] = static_cast<A>(alibi.total());
    }
    if (p.maybe_grad_sink) static_cast<A*>(p.maybe_grad_sink)[head] = static_cast<A>(sink.total());
  }
}
