// What becomes of a tile of products q . k, step by step in whole vectors. The steps themselves are
// those of attention_score.h. Part of attention_cpu.inl.

// tanh(score / softcap), and its derivative into `maybe_slopes`.
template <typename A>
static void softcap_lanes(A softcap, A* scores, A* maybe_slopes) {
  if (maybe_slopes == nullptr) {
#pragma omp simd
    for (int32_t i = 0; i < kOwnRows<A>; ++i) {
      scores[i] = softcapped(softcap, vector_tanh(scores[i] / softcap)).value;
    }
    return;
  }
#pragma omp simd
  for (int32_t i = 0; i < kOwnRows<A>; ++i) {
    const Score<A> score = softcapped(softcap, vector_tanh(scores[i] / softcap));
    scores[i] = score.value;
    maybe_slopes[i] = score.slope;
  }
}

// Rows that follow each other, or columns, are each one further from the diagonal, or nearer to it.
template <typename A, bool kOwnsQueries>
static void alibi_lanes(const TilePlace<kOwnsQueries>& tile, int32_t j, A slope, A* scores) {
  const int32_t aligned = tile.sequence.seqlen_k - tile.sequence.seqlen_q;
  const int32_t ahead = tile.row(0, j) - tile.column(0, j) + aligned;
  const int32_t first = kOwnsQueries ? ahead : -ahead;
#pragma omp simd
  for (int32_t i = 0; i < kOwnRows<A>; ++i) {
    scores[i] -= slope * static_cast<A>(first + i < 0 ? -(first + i) : first + i);
  }
}

// What a mask's element adds to a score; a boolean one only says -inf for hidden.
template <typename A, typename M>
static inline A mask_value(M element) {
  if constexpr (std::is_same_v<M, bool>) {
    return element ? A(0) : kHiddenScore<A>;
  } else {
    return static_cast<A>(load(element));
  }
}

// A tile of the mask as the scores lie, [other_rows][kOwnRows]: in whole vectors along whichever of
// its dimensions is contiguous. Behind it in the buffer is room for the tile turned over.
template <typename A, bool kOwnsQueries, typename M>
static void load_mask_tile(const AttentionMask& mask, const TilePlace<kOwnsQueries>& tile,
                           A* values) {
  constexpr int32_t kRows = kOwnRows<A>;
  A* rows = values + kOtherRows * kRows;
  const M* first = static_cast<const M*>(mask.data) + tile.sequence.index * mask.batch_stride +
                   tile.head * mask.head_stride + tile.row(0, 0) * mask.row_stride +
                   tile.column(0, 0) * mask.column_stride;
  const int64_t stride = kOwnsQueries ? mask.row_stride : mask.column_stride;
  const int64_t other_stride = kOwnsQueries ? mask.column_stride : mask.row_stride;
  if (stride > 1 && other_stride == 1) {
    for (int32_t i = 0; i < tile.own_rows; ++i) {
#pragma omp simd
      for (int32_t j = 0; j < tile.other_rows; ++j) {
        rows[i * kOtherRows + j] = mask_value<A>(first[i * stride + j]);
      }
    }
    transpose(rows, kOtherRows, tile.own_rows, tile.other_rows, values, kRows);
    return;
  }
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    const M* of_other = first + j * other_stride;
    A* to = values + j * kRows;
    if (stride == 0) {
      std::fill_n(to, tile.own_rows, mask_value<A>(*of_other));
    } else if (stride == 1) {
#pragma omp simd
      for (int32_t i = 0; i < tile.own_rows; ++i) to[i] = mask_value<A>(of_other[i]);
    } else {
      for (int32_t i = 0; i < tile.own_rows; ++i) to[i] = mask_value<A>(of_other[i * stride]);
    }
  }
}

// The part of a tile that the mask has, and the rest of the scores hidden.
template <typename A, bool kOwnsQueries>
static TilePlace<kOwnsQueries> hide_beyond(const AttentionMask& mask, TilePlace<kOwnsQueries> tile,
                                           A* scores) {
  const int32_t own_end = kOwnsQueries ? mask.rows : mask.columns;
  const int32_t other_end = kOwnsQueries ? mask.columns : mask.rows;
  const int32_t lanes = std::clamp(own_end - tile.own_row, 0, tile.own_rows);
  const int32_t others = lanes > 0 ? std::clamp(other_end - tile.other_row, 0, tile.other_rows) : 0;
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    A* of_other = scores + j * kOwnRows<A>;
    std::fill(of_other + (j < others ? lanes : 0), of_other + tile.own_rows, kHiddenScore<A>);
  }
  tile.own_rows = lanes;
  tile.other_rows = others;
  return tile;
}

template <typename A, bool kOwnsQueries>
static void mask_tile(const AttentionMask& mask, const TilePlace<kOwnsQueries>& whole, A* values,
                      A* scores) {
  constexpr int32_t kRows = kOwnRows<A>;
  const TilePlace<kOwnsQueries> tile = hide_beyond(mask, whole, scores);
  if (tile.other_rows == 0) return;
  if (mask.kind == MaskKind::kBool) {
    load_mask_tile<A, kOwnsQueries, bool>(mask, tile, values);
    for (int32_t j = 0; j < tile.other_rows; ++j) {
#pragma omp simd
      for (int32_t i = 0; i < tile.own_rows; ++i) {
        A& score = scores[j * kRows + i];
        score = values[j * kRows + i] < 0 ? kHiddenScore<A> : score;
      }
    }
    return;
  }
  visit_dtype(mask.dtype, [&](auto element) {
    load_mask_tile<A, kOwnsQueries, decltype(element)>(mask, tile, values);
  });
  for (int32_t j = 0; j < tile.other_rows; ++j) {
#pragma omp simd
    for (int32_t i = 0; i < tile.own_rows; ++i) scores[j * kRows + i] += values[j * kRows + i];
  }
}

// Hides the lanes that lie outside the band.
template <typename A, bool kOwnsQueries>
static void band_lanes(const Band& band, const TilePlace<kOwnsQueries>& tile, int32_t j,
                       A* scores) {
  const int32_t other = tile.other_row + j;
  const Range visible = kOwnsQueries ? rows_seeing(tile.sequence, band, other, other)
                                     : keys_seen_by(tile.sequence, band, other, other);
  const int32_t begin = std::clamp(visible.begin - tile.own_row, 0, tile.own_rows);
  const int32_t end = std::clamp(visible.end - tile.own_row, begin, tile.own_rows);
  std::fill(scores, scores + begin, kHiddenScore<A>);
  std::fill(scores + end, scores + tile.own_rows, kHiddenScore<A>);
}

// What final_scores needs for a mask: two tiles.
template <typename A>
static Scratch<A> mask_buffer(const AttentionProblem& p) {
  return Scratch<A>(p.mask.kind != MaskKind::kNone ? 2 * kOtherRows * kOwnRows<A> : 0);
}

// Turns the products q . k in `scores` into final scores, and gives their derivatives by the scaled
// products in `maybe_slopes`, which only a softcap fills. Lanes beyond own_rows hold what they may:
// nothing reads their results.
template <typename A, bool kOwnsQueries>
static void final_scores(const AttentionProblem& p, const Band& band,
                         const TilePlace<kOwnsQueries>& tile, A* mask_buffer, A* scores,
                         A* maybe_slopes) {
  const int32_t last = tile.other_rows - 1, last_lane = tile.own_rows - 1;
  // Of the tile's corners, those farthest from the diagonal on either side.
  const bool all_visible = is_visible(band, tile.row(last_lane, 0), tile.column(last_lane, 0)) &&
                           is_visible(band, tile.row(0, last), tile.column(0, last));
  const A scale = static_cast<A>(p.scale), softcap = static_cast<A>(p.softcap);
  const A* slopes = static_cast<const A*>(p.maybe_alibi_slopes);
#pragma omp simd
  for (int32_t i = 0; i < tile.other_rows * kOwnRows<A>; ++i) scores[i] *= scale;
  for (int32_t j = 0; (softcap != 0 || slopes != nullptr) && j < tile.other_rows; ++j) {
    A* of_other = scores + j * kOwnRows<A>;
    if (softcap != 0) {
      softcap_lanes(softcap, of_other, maybe_slopes ? maybe_slopes + j * kOwnRows<A> : nullptr);
    }
    if (slopes != nullptr) alibi_lanes(tile, j, slopes[tile.head], of_other);
  }
  if (p.mask.kind != MaskKind::kNone) mask_tile(p.mask, tile, mask_buffer, scores);
  for (int32_t j = 0; !all_visible && j < tile.other_rows; ++j) {
    band_lanes(band, tile, j, scores + j * kOwnRows<A>);
  }
}

template <typename A, bool kOwnsQueries>
static void multiply_by_dropout(const AttentionProblem& p, const TilePlace<kOwnsQueries>& tile,
                                A* weights) {
  if (p.maybe_rng == nullptr) return;
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    for (int32_t i = 0; i < tile.own_rows; ++i) {
      weights[j * kOwnRows<A> + i] *=
          dropout_scale<A>(p, tile.sequence, tile.head, tile.row(i, j), tile.column(i, j));
    }
  }
}
