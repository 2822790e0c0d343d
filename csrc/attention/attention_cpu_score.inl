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
static void alibi_lanes(const AttentionProblem& p, const TilePlace<kOwnsQueries>& tile, int32_t j,
                        A slope, A* scores) {
  const int32_t aligned = p.seqlen_k - p.seqlen_q;
  const int32_t ahead = tile.row(0, j) - tile.column(0, j) + aligned;
  const int32_t first = kOwnsQueries ? ahead : -ahead;
#pragma omp simd
  for (int32_t i = 0; i < kOwnRows<A>; ++i) {
    scores[i] -= slope * static_cast<A>(first + i < 0 ? -(first + i) : first + i);
  }
}

template <typename A, bool kOwnsQueries>
static void mask_lanes(const AttentionMask& mask, const TilePlace<kOwnsQueries>& tile, int32_t j,
                       A* scores) {
  const int64_t first = tile.batch * mask.batch_stride + tile.head * mask.head_stride +
                        tile.row(0, j) * mask.row_stride + tile.column(0, j) * mask.column_stride;
  const int64_t stride = kOwnsQueries ? mask.row_stride : mask.column_stride;
  if (mask.kind == MaskKind::kBool) {
    const bool* visible = static_cast<const bool*>(mask.data) + first;
    for (int32_t i = 0; i < tile.own_rows; ++i) {
      scores[i] = visible[i * stride] ? scores[i] : kHiddenScore<A>;
    }
    return;
  }
  visit_dtype(mask.dtype, [&](auto element) {
    using M = decltype(element);
    const M* added = static_cast<const M*>(mask.data) + first;
    for (int32_t i = 0; i < tile.own_rows; ++i)
      scores[i] += static_cast<A>(load(added[i * stride]));
  });
}

// Hides the lanes that lie outside the band.
template <typename A, bool kOwnsQueries>
static void band_lanes(const AttentionProblem& p, const Band& band,
                       const TilePlace<kOwnsQueries>& tile, int32_t j, A* scores) {
  const int32_t other = tile.other_row + j;
  const Range visible =
      kOwnsQueries ? rows_seeing(p, band, other, other) : keys_seen_by(p, band, other, other);
  const int32_t begin = std::clamp(visible.begin - tile.own_row, 0, tile.own_rows);
  const int32_t end = std::clamp(visible.end - tile.own_row, begin, tile.own_rows);
  std::fill(scores, scores + begin, kHiddenScore<A>);
  std::fill(scores + end, scores + tile.own_rows, kHiddenScore<A>);
}

// Turns the products q . k in `scores` into final scores, and gives their derivatives by the scaled
// products in `maybe_slopes`, which only a softcap fills. Lanes beyond own_rows hold what they may:
// nothing reads their results.
template <typename A, bool kOwnsQueries>
static void final_scores(const AttentionProblem& p, const Band& band,
                         const TilePlace<kOwnsQueries>& tile, A* scores, A* maybe_slopes) {
  const int32_t last = tile.other_rows - 1, last_lane = tile.own_rows - 1;
  // Of the tile's corners, those farthest from the diagonal on either side.
  const bool all_visible = is_visible(band, tile.row(last_lane, 0), tile.column(last_lane, 0)) &&
                           is_visible(band, tile.row(0, last), tile.column(0, last));
  const A scale = static_cast<A>(p.scale), softcap = static_cast<A>(p.softcap);
  const A* slopes = static_cast<const A*>(p.maybe_alibi_slopes);
#pragma omp simd
  for (int32_t i = 0; i < tile.other_rows * kOwnRows<A>; ++i) scores[i] *= scale;
  const bool has_mask = p.mask.kind != MaskKind::kNone;
  if (softcap == 0 && slopes == nullptr && !has_mask && all_visible) return;
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    A* of_other = scores + j * kOwnRows<A>;
    if (softcap != 0) {
      softcap_lanes(softcap, of_other, maybe_slopes ? maybe_slopes + j * kOwnRows<A> : nullptr);
    }
    if (slopes != nullptr) alibi_lanes(p, tile, j, slopes[tile.head], of_other);
    if (has_mask) mask_lanes(p.mask, tile, j, of_other);
    if (!all_visible) band_lanes(p, band, tile, j, of_other);
  }
}

template <typename A, bool kOwnsQueries>
static void multiply_by_dropout(const AttentionProblem& p, const TilePlace<kOwnsQueries>& tile,
                                A* weights) {
  if (p.maybe_rng == nullptr) return;
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    for (int32_t i = 0; i < tile.own_rows; ++i) {
      weights[j * kOwnRows<A> + i] *=
          dropout_scale<A>(p, tile.batch, tile.head, tile.row(i, j), tile.column(i, j));
    }
  }
}
