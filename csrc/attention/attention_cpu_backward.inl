// Attention backward on the CPU: one task for each tile of queries (grad_q) or of keys (grad_k,
// grad_v) of a head. Part of attention_cpu.inl.

// delta[row] = sum(grad_out * out) - grad_lse, for rows of all heads.
template <typename T, typename A = Accumulator<T>>
static void delta_rows(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  const A* maybe_grad_lse = static_cast<const A*>(p.maybe_grad_lse);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index % p.seqlen_q, head = index / p.seqlen_q % p.num_heads,
                  batch = index / p.seqlen_q / p.num_heads;
    const T* out = static_cast<const T*>(p.out) + batch * p.out_strides.batch +
                   head * p.out_strides.head + row * p.out_strides.row;
    const T* grad_out = static_cast<const T*>(p.grad_out) + batch * p.grad_out_strides.batch +
                        head * p.grad_out_strides.head + row * p.grad_out_strides.row;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t d = 0; d < p.head_dim_v; ++d) sum += load(out[d]) * load(grad_out[d]);
    static_cast<A*>(p.delta)[index] = maybe_grad_lse ? sum - maybe_grad_lse[index] : sum;
  }
}

// Scores become keep * p, and dots = grad_out . v become ds, the derivative by the final score.
// Hidden keys get zeros, not even a NaN.
template <typename A, bool kOwnsQueries>
static void backward_weights(const AttentionBackwardParams& p, const TilePlace<kOwnsQueries>& tile,
                             A* scores, A* dots) {
  const int64_t row_base = (int64_t{tile.batch} * p.num_heads + tile.head) * p.seqlen_q;
  const A* max = static_cast<const A*>(p.row_stats) + row_base;
  const A* inverse_sum = max + int64_t{p.batch} * p.num_heads * p.seqlen_q;
  const A* delta = static_cast<const A*>(p.delta) + row_base;
  alignas(64) A keep[kOwnRows<A>];
  std::fill_n(keep, kOwnRows<A>, A(1));
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    A* of_score = scores + j * kOwnRows<A>;
    A* of_dot = dots + j * kOwnRows<A>;
    if (p.maybe_rng != nullptr) {
      for (int32_t i = 0; i < tile.own_rows; ++i) {
        keep[i] = dropout_scale<A>(p, tile.batch, tile.head, tile.row(i, j), tile.column(i, j));
      }
    }
#pragma omp simd
    for (int32_t i = 0; i < tile.own_rows; ++i) {
      const int32_t row = kOwnsQueries ? tile.own_row + i : tile.other_row + j;
      const bool hidden = of_score[i] == kHiddenScore<A>;
      const A probability = vector_exp(of_score[i] - max[row]) * inverse_sum[row];
      of_score[i] = hidden ? A(0) : keep[i] * probability;
      of_dot[i] = hidden ? A(0) : probability * (keep[i] * of_dot[i] - delta[row]);
    }
  }
}

// What the gradients of a tile are made of, from its owner's packed rows: keep * p in `scores`, ds
// in `dots`, and with a softcap what leads from there to scale * q . k in `slopes`.
template <typename A, bool kOwnsQueries>
static void tile_weights(const AttentionBackwardParams& p, const Band& band,
                         const TilePlace<kOwnsQueries>& tile, const TileRows<A>& other,
                         const TileRows<A>& other_v, const A* own, const A* own_v, A* scores,
                         A* dots, A* slopes) {
  pair_products(other, tile.other_rows, own, tile.own_rows, p.head_dim, scores);
  pair_products(other_v, tile.other_rows, own_v, tile.own_rows, p.head_dim_v, dots);
  final_scores(p, band, tile, scores, slopes);
  backward_weights(p, tile, scores, dots);
}

// From ds to the derivative by scale * q . k. The zero of a hidden key stays one beside a NaN.
template <typename A>
static void multiply_by_slopes(int32_t other_rows, const A* slopes, A* gradients) {
#pragma omp simd
  for (int32_t i = 0; i < other_rows * kOwnRows<A>; ++i) {
    gradients[i] = gradients[i] == 0 ? A(0) : gradients[i] * slopes[i];
  }
}

// grad_q for tiles of queries, or grad_k and grad_v for tiles of keys.
template <bool kOwnsQueries, typename T, typename A = Accumulator<T>>
static void backward_tasks(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  constexpr int32_t kRows = kOwnRows<A>;
  const int32_t own_length = kOwnsQueries ? p.seqlen_q : p.seqlen_k;
  const int32_t own_heads = kOwnsQueries ? p.num_heads : p.num_heads_kv;
  const int32_t tiles = (own_length + kRows - 1) / kRows;
  const int32_t group = p.num_heads / p.num_heads_kv;
  const Band band = visible_band(p);
  const Scratch<A> own(int64_t{p.head_dim} * kRows), own_v(int64_t{p.head_dim_v} * kRows),
      scores(int64_t{kOtherRows} * kRows), dots(int64_t{kOtherRows} * kRows),
      slopes(p.softcap != 0 ? int64_t{kOtherRows} * kRows : 0), result(int64_t{p.head_dim} * kRows),
      result_v(int64_t{p.head_dim_v} * kRows), buffer(int64_t{kOtherRows} * kMaxHeadDim),
      buffer_v(int64_t{kOtherRows} * kMaxHeadDim);
  alignas(64) A row_scale[kRows];

  for (int64_t task = begin; task < end; ++task) {
    const int32_t own_row = static_cast<int32_t>(task % tiles) * kRows;
    const int32_t own_head = static_cast<int32_t>(task / tiles % own_heads);
    const int32_t batch = static_cast<int32_t>(task / tiles / own_heads);
    const int32_t rows = std::min(kRows, own_length - own_row);
    const int32_t head_kv = kOwnsQueries ? own_head / group : own_head;
    const auto k = head_matrix<T>(p.k, p.k_strides, batch, head_kv, p.head_dim);
    const auto v = head_matrix<T>(p.v, p.v_strides, batch, head_kv, p.head_dim_v);
    std::fill_n(result.data(), int64_t{p.head_dim} * kRows, A(0));
    std::fill_n(result_v.data(), int64_t{p.head_dim_v} * kRows, A(0));
    std::fill_n(scores.data(), kOtherRows * kRows, A(0));
    std::fill_n(dots.data(), kOtherRows * kRows, A(0));
    if (!kOwnsQueries) {
      pack_transposed(k, own_row, rows, own.data());
      pack_transposed(v, own_row, rows, own_v.data());
    }

    // A key's gradient sums over all query heads that share it.
    const int32_t head_begin = kOwnsQueries ? own_head : own_head * group;
    const int32_t head_end = kOwnsQueries ? own_head + 1 : head_begin + group;
    for (int32_t head = head_begin; head < head_end; ++head) {
      const auto q = head_matrix<T>(p.q, p.q_strides, batch, head, p.head_dim);
      const auto grad_out =
          head_matrix<T>(p.grad_out, p.grad_out_strides, batch, head, p.head_dim_v);
      if (kOwnsQueries) {
        pack_transposed(q, own_row, rows, own.data());
        pack_transposed(grad_out, own_row, rows, own_v.data());
      }
      const Range others = kOwnsQueries ? keys_seen_by(p, band, own_row, own_row + rows - 1)
                                        : rows_seeing(p, band, own_row, own_row + rows - 1);
      for (int32_t other_row = others.begin; other_row < others.end; other_row += kOtherRows) {
        const TilePlace<kOwnsQueries> tile{
            batch, head, own_row, rows, other_row, std::min(kOtherRows, others.end - other_row)};
        const auto other =
            tile_rows(kOwnsQueries ? k : q, other_row, tile.other_rows, buffer.data());
        const auto other_v =
            tile_rows(kOwnsQueries ? v : grad_out, other_row, tile.other_rows, buffer_v.data());
        tile_weights(p, band, tile, other, other_v, own.data(), own_v.data(), scores.data(),
                     dots.data(), slopes.data());
        if (p.softcap != 0) multiply_by_slopes(tile.other_rows, slopes.data(), dots.data());
        accumulate(other, tile.other_rows, dots.data(), rows, p.head_dim, result.data());
        if (!kOwnsQueries) {
          accumulate(other_v, tile.other_rows, scores.data(), rows, p.head_dim_v, result_v.data());
        }
      }
    }

    const auto store_gradient = [&](const A* gradient, double scale, void* data,
                                    const HeadStrides& strides, int32_t columns) {
      std::fill_n(row_scale, kRows, static_cast<A>(scale));
      T* target = static_cast<T*>(data) + batch * strides.batch + own_head * strides.head +
                  own_row * strides.row;
      store_transposed(gradient, row_scale, rows, columns, target, strides.row);
    };
    if (kOwnsQueries) {
      store_gradient(result.data(), p.scale, p.maybe_grad_q, p.grad_q_strides, p.head_dim);
    } else {
      store_gradient(result.data(), p.scale, p.maybe_grad_k, p.grad_k_strides, p.head_dim);
      store_gradient(result_v.data(), 1.0, p.maybe_grad_v, p.grad_v_strides, p.head_dim_v);
    }
  }
}
