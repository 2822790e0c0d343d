// The gradients that the scores themselves have on the CPU: of an additive mask, of ALiBi slopes,
// and of the sink. Part of attention_cpu.inl.

// What a task has of `extent` tiles or heads: one of them, or all, to sum over.
static inline Range take_share(int64_t stride, int32_t extent, int64_t& index) {
  if (stride == 0) return {0, extent};
  const int32_t place = static_cast<int32_t>(index % extent);
  index /= extent;
  return {place, place + 1};
}

template <typename A>
static int32_t num_row_tiles(const AttentionProblem& p) {
  return (p.seqlen_q + kOwnRows<A> - 1) / kOwnRows<A>;
}
static inline int32_t num_key_tiles(const AttentionProblem& p) {
  return (p.seqlen_k + kOtherRows - 1) / kOtherRows;
}

// Adds a tile of ds to the sums, or of what it says about the slopes.
template <typename A>
static void add_tile(const AttentionProblem& p, const Band& band, const TilePlace<true>& tile,
                     bool by_distance, const A* gradients, A* sums) {
  int32_t nearest[kOwnRows<A>];
  for (int32_t i = 0; by_distance && i < tile.own_rows; ++i) {
    nearest[i] = nearest_distance(p, band, tile.own_row + i);
  }
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    const A* from = gradients + j * kOwnRows<A>;
    A* to = sums + j * kOwnRows<A>;
    if (by_distance) {
#pragma omp simd
      for (int32_t i = 0; i < tile.own_rows; ++i) {
        const int32_t distance = alibi_distance(p, tile.row(i, j), tile.column(i, j));
        to[i] -= from[i] * static_cast<A>(distance - nearest[i]);
      }
    } else {
#pragma omp simd
      for (int32_t i = 0; i < tile.own_rows; ++i) to[i] += from[i];
    }
  }
}

// Writes rows by columns of sums, summed over the dimensions that the gradient does not have.
template <typename A>
static void store_sums(const ScoreGradient& gradient, A* sums, int32_t rows, int32_t columns,
                       A* target) {
  constexpr int32_t kRows = kOwnRows<A>;
  if (gradient.row_stride == 0) {
    for (int32_t j = 0; j < columns; ++j) {
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int32_t i = 0; i < rows; ++i) sum += sums[j * kRows + i];
      sums[j * kRows] = sum;
    }
    rows = 1;
  }
  if (gradient.column_stride == 0) {
    for (int32_t j = 1; j < columns; ++j) {
#pragma omp simd
      for (int32_t i = 0; i < rows; ++i) sums[i] += sums[j * kRows + i];
    }
    columns = 1;
  }
  for (int32_t i = 0; i < rows; ++i) {
    for (int32_t j = 0; j < columns; ++j) {
      target[i * gradient.row_stride + j * gradient.column_stride] = sums[j * kRows + i];
    }
  }
}

// One task for each tile of the gradient, which sums over what the gradient is broadcast over, in
// the order of batch, heads, rows and keys.
template <typename T, typename A = Accumulator<T>>
static void score_gradient_tasks(const AttentionBackwardParams& p, const ScoreGradient& gradient,
                                 bool by_distance, int64_t begin, int64_t end) {
  constexpr int32_t kRows = kOwnRows<A>, kTile = kOtherRows * kRows;
  const int32_t group = p.num_heads / p.num_heads_kv;
  const Band band = visible_band(p);
  const Scratch<A> own(int64_t{p.head_dim} * kRows), own_v(int64_t{p.head_dim_v} * kRows),
      scores(kTile), dots(kTile), slopes(kTile), sums(kTile),
      buffer(int64_t{kOtherRows} * kMaxHeadDim), buffer_v(int64_t{kOtherRows} * kMaxHeadDim);

  for (int64_t task = begin; task < end; ++task) {
    int64_t index = task;
    const Range key_tiles = take_share(gradient.column_stride, num_key_tiles(p), index);
    const Range row_tiles = take_share(gradient.row_stride, num_row_tiles<A>(p), index);
    const Range heads = take_share(gradient.head_stride, p.num_heads, index);
    const Range batches = take_share(gradient.batch_stride, p.batch, index);
    std::fill_n(sums.data(), kTile, A(0));
    for (int32_t batch = batches.begin; batch < batches.end; ++batch) {
      for (int32_t head = heads.begin; head < heads.end; ++head) {
        const auto q = head_matrix<T>(p.q, p.q_strides, batch, head, p.head_dim);
        const auto k = head_matrix<T>(p.k, p.k_strides, batch, head / group, p.head_dim);
        const auto v = head_matrix<T>(p.v, p.v_strides, batch, head / group, p.head_dim_v);
        const auto grad_out =
            head_matrix<T>(p.grad_out, p.grad_out_strides, batch, head, p.head_dim_v);
        for (int32_t row_tile = row_tiles.begin; row_tile < row_tiles.end; ++row_tile) {
          const int32_t row = row_tile * kRows, rows = std::min(kRows, p.seqlen_q - row);
          const Range keys = keys_seen_by(p, band, row, row + rows - 1);
          pack_transposed(q, row, rows, own.data());
          pack_transposed(grad_out, row, rows, own_v.data());
          for (int32_t key_tile = key_tiles.begin; key_tile < key_tiles.end; ++key_tile) {
            const int32_t key = key_tile * kOtherRows;
            if (key >= keys.end || key + kOtherRows <= keys.begin) continue;
            const TilePlace<true> tile{batch, head, row,
                                       rows,  key,  std::min(kOtherRows, p.seqlen_k - key)};
            tile_weights(p, band, tile, tile_rows(k, key, tile.other_rows, buffer.data()),
                         tile_rows(v, key, tile.other_rows, buffer_v.data()), own.data(),
                         own_v.data(), scores.data(), dots.data(), slopes.data());
            add_tile(p, band, tile, by_distance, dots.data(), sums.data());
          }
        }
      }
    }
    const int32_t row = row_tiles.begin * kRows, key = key_tiles.begin * kOtherRows;
    A* target = static_cast<A*>(gradient.data) + batches.begin * gradient.batch_stride +
                heads.begin * gradient.head_stride + row * gradient.row_stride +
                key * gradient.column_stride;
    store_sums(gradient, sums.data(), std::min(kRows, p.seqlen_q - row),
               std::min(kOtherRows, p.seqlen_k - key), target);
  }
}

template <typename T>
static void score_gradient(const AttentionBackwardParams& p, const ScoreGradient& gradient,
                           bool by_distance) {
  const int64_t tasks = (gradient.batch_stride ? int64_t{p.batch} : 1) *
                        (gradient.head_stride ? p.num_heads : 1) *
                        (gradient.row_stride ? num_row_tiles<Accumulator<T>>(p) : 1) *
                        (gradient.column_stride ? num_key_tiles(p) : 1);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    score_gradient_tasks<T>(p, gradient, by_distance, begin, end);
  });
}

// The gradients of the slopes and of the sink, from what each row gives to them.
template <typename A>
static void head_sums(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  const A* maybe_row_alibi = static_cast<const A*>(p.maybe_row_alibi);
  const A* delta = static_cast<const A*>(p.delta);
  const Band band = visible_band(p);
  for (int64_t head = begin; head < end; ++head) {
    double alibi = 0, sink = 0;
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      const int64_t first = (batch * p.num_heads + head) * p.seqlen_q;
      for (int64_t row = first; row < first + p.seqlen_q; ++row) {
        if (maybe_row_alibi) {
          alibi += static_cast<double>(maybe_row_alibi[row]) +
                   nearest_alibi_gradient<A>(p, band, static_cast<int32_t>(row - first), row);
        }
        if (p.maybe_grad_sink) {
          sink += sink_gradient(static_cast<const A*>(p.maybe_sink)[head],
                                load_row_stats<A>(p, p.row_stats, row), delta[row]);
        }
      }
    }
    if (maybe_row_alibi) static_cast<A*>(p.maybe_grad_alibi_slopes)[head] = static_cast<A>(alibi);
    if (p.maybe_grad_sink) static_cast<A*>(p.maybe_grad_sink)[head] = static_cast<A>(sink);
  }
}
