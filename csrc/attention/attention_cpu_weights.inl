// What the gradients are made of on the CPU: the weights of a tile and the derivatives of its
// scores. Part of attention_cpu.inl.

// delta[row] = sum(grad_out * out) - grad_lse, for rows of all heads.
template <typename T, typename A = Accumulator<T>>
static void delta_rows(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  const A* maybe_grad_lse = static_cast<const A*>(p.maybe_grad_lse);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index % p.seqlen_q, head = index / p.seqlen_q % p.num_heads,
                  batch = index / p.seqlen_q / p.num_heads;
    const T* out = head_matrix<T>(p.out, p.out_strides, batch, head, p.head_dim_v).row(row);
    const T* grad_out =
        head_matrix<T>(p.grad_out, p.grad_out_strides, batch, head, p.head_dim_v).row(row);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t d = 0; d < p.head_dim_v; ++d) sum += load(out[d]) * load(grad_out[d]);
    static_cast<A*>(p.delta)[index] = maybe_grad_lse ? sum - maybe_grad_lse[index] : sum;
  }
}

// What a tile's rows bring along: their largest score, 1 / sum(exp(score - largest)) and delta.
template <typename A>
struct RowValues {
  const A *max, *inverse_sum, *delta;
};

template <typename A, bool kOwnsQueries>
static RowValues<A> row_values(const AttentionBackwardParams& p,
                               const TilePlace<kOwnsQueries>& tile) {
  const int64_t rows = int64_t{p.batch} * p.num_heads * p.seqlen_q;
  const int64_t first = row_of_all(p, tile.sequence, tile.head, tile.row(0, 0));
  const A* stats = static_cast<const A*>(p.row_stats) + first;
  return {stats, stats + rows, static_cast<const A*>(p.delta) + first};
}

// One vector of weights and derivatives: scores become keep * p, and dots = grad_out . v become ds,
// the derivative by the final score. Hidden keys get zeros, not even a NaN.
template <typename A, typename Row>
static inline void weigh(const A* maybe_keep, const Row& max, const Row& inverse_sum,
                         const Row& delta, A* score, A* dot) {
  using Vector = typename VectorOf<A>::type;
  Vector& s = *reinterpret_cast<Vector*>(score);
  Vector& d = *reinterpret_cast<Vector*>(dot);
  const auto hidden = s == kHiddenScore<A>;
  const Vector zero{};
  const Vector probability = softmax_exp(s - max) * inverse_sum;
  if (maybe_keep == nullptr) {
    s = hidden ? zero : probability;
    d = hidden ? zero : probability * (d - delta);
  } else {
    const Vector keep = *reinterpret_cast<const Vector*>(maybe_keep);
    s = hidden ? zero : keep * probability;
    d = hidden ? zero : probability * (keep * d - delta);
  }
}

template <typename A, bool kOwnsQueries>
static void backward_weights(const AttentionBackwardParams& p, const TilePlace<kOwnsQueries>& tile,
                             A* scores, A* dots) {
  using Vector = typename VectorOf<A>::type;
  constexpr int32_t kRows = kOwnRows<A>;
  RowValues<A> of_row = row_values<A>(p, tile);
  alignas(64) A lanes[3][kRows] = {}, keep[kRows] = {};
  if (kOwnsQueries) {
    std::copy_n(of_row.max, tile.own_rows, lanes[0]);
    std::copy_n(of_row.inverse_sum, tile.own_rows, lanes[1]);
    std::copy_n(of_row.delta, tile.own_rows, lanes[2]);
    of_row = {lanes[0], lanes[1], lanes[2]};
  }
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    A *of_score = scores + j * kRows, *of_dot = dots + j * kRows;
    if (p.maybe_rng != nullptr) {
      for (int32_t i = 0; i < tile.own_rows; ++i) {
        keep[i] = dropout_scale<A>(p, tile.sequence, tile.head, tile.row(i, j), tile.column(i, j));
      }
    }
    for (int32_t i = 0; i < tile.own_rows; i += kLanes<A>) {
      const A* maybe_keep = p.maybe_rng != nullptr ? keep + i : nullptr;
      if constexpr (kOwnsQueries) {
        const auto vector = [&](const A* at) { return *reinterpret_cast<const Vector*>(at + i); };
        weigh(maybe_keep, vector(of_row.max), vector(of_row.inverse_sum), vector(of_row.delta),
              of_score + i, of_dot + i);
      } else {
        weigh(maybe_keep, of_row.max[j], of_row.inverse_sum[j], of_row.delta[j], of_score + i,
              of_dot + i);
      }
    }
    // Lanes without a row hold what they may; sums over lanes need zeros there.
    std::fill(of_score + tile.own_rows, of_score + kRows, A(0));
    std::fill(of_dot + tile.own_rows, of_dot + kRows, A(0));
  }
}

// From ds to the derivative by scale * q . k. The zero of a hidden key stays one beside a NaN.
template <typename A>
static void multiply_by_slopes(int32_t other_rows, const A* slopes, A* gradients) {
#pragma omp simd
  for (int32_t i = 0; i < other_rows * kOwnRows<A>; ++i) {
    gradients[i] = gradients[i] == 0 ? A(0) : gradients[i] * slopes[i];
  }
}

// A tile's weights keep * p in `scores`, ds in `dots`, and with a softcap what leads from there to
// the derivative by scale * q . k in `slopes`.
template <typename A>
struct WeightsTile {
  explicit WeightsTile(const AttentionProblem& p)
      : scores(kOtherRows * kOwnRows<A>),
        dots(kOtherRows * kOwnRows<A>),
        slopes(p.softcap.as<A>() != 0 ? kOtherRows * kOwnRows<A> : 0) {
    std::fill_n(scores.data(), kOtherRows * kOwnRows<A>, A(0));
    std::fill_n(dots.data(), kOtherRows * kOwnRows<A>, A(0));
  }
  const Scratch<A> scores, dots, slopes;
};

// Fills a tile from its owner's lanes and the others' rows: q and grad_out, or k and v.
template <typename E, typename A, bool kOwnsQueries>
static void tile_weights(const AttentionBackwardParams& p, const Band& band,
                         const TilePlace<kOwnsQueries>& tile, const TileBlocks& blocks,
                         const TileRows<E>& other, const TileRows<E>& other_v, const E* own,
                         const E* own_v, const WeightsTile<A>& weights) {
  A *scores = weights.scores.data(), *dots = weights.dots.data();
  pair_products(other, own, blocks, p.head_dim, scores);
  pair_products(other_v, own_v, blocks, p.head_dim_v, dots);
  final_scores(p, band, tile, scores, weights.slopes.data());
  backward_weights(p, tile, scores, dots);
}
