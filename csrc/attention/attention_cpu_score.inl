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

// What a mask's element adds to a score: a boolean one only says -inf for hidden, and is read as
// the byte that it is.
template <typename A, typename M>
static inline A mask_value(M element) {
  if constexpr (std::is_same_v<M, uint8_t>) {
    return static_cast<int32_t>(element) != 0 ? A(0) : kHiddenScore<A>;
  } else {
    return static_cast<A>(load(element));
  }
}

// The part of a tile that lies before the mask's last row and column.
template <bool kOwnsQueries>
static TilePlace<kOwnsQueries> within_mask(const AttentionMask& mask,
                                           TilePlace<kOwnsQueries> tile) {
  const int32_t own_end = kOwnsQueries ? mask.rows : mask.columns;
  const int32_t other_end = kOwnsQueries ? mask.columns : mask.rows;
  tile.own_rows = std::clamp(own_end - tile.own_row, 0, tile.own_rows);
  tile.other_rows =
      tile.own_rows > 0 ? std::clamp(other_end - tile.other_row, 0, tile.other_rows) : 0;
  return tile;
}

// A tile's part of a mask, from the element of its first row and lane.
template <typename M>
struct MaskTile {
  template <bool kOwnsQueries>
  MaskTile(const AttentionMask& mask, const TilePlace<kOwnsQueries>& tile)
      : first(static_cast<const M*>(mask.data) + tile.sequence.index * mask.batch_stride +
              tile.head * mask.head_stride + tile.row(0, 0) * mask.row_stride +
              tile.column(0, 0) * mask.column_stride),
        lane_stride(kOwnsQueries ? mask.row_stride : mask.column_stride),
        other_stride(kOwnsQueries ? mask.column_stride : mask.row_stride),
        lanes(tile.own_rows),
        others(tile.other_rows) {}

  const M* first;
  int64_t lane_stride, other_stride;
  int32_t lanes, others;
};

// Whether a mask hides all of a tile, which then need not be computed. Most tiles show something
// at once.
template <typename A, bool kOwnsQueries>
static bool mask_hides(const AttentionMask& mask, const TilePlace<kOwnsQueries>& whole) {
  if (mask.kind == MaskKind::kNone) return false;
  const TilePlace<kOwnsQueries> place = within_mask(mask, whole);
  if (place.other_rows == 0) return true;
  return visit_mask(mask, [&](auto element) {
    const MaskTile<decltype(element)> tile(mask, place);
    const bool by_lanes = tile.lane_stride != 1 && tile.other_stride <= 1;
    const int64_t outer_stride = by_lanes ? tile.lane_stride : tile.other_stride;
    const int64_t inner_stride = by_lanes ? tile.other_stride : tile.lane_stride;
    const int32_t outer = outer_stride == 0 ? 1 : by_lanes ? tile.lanes : tile.others;
    const int32_t inner = inner_stride == 0 ? 1 : by_lanes ? tile.others : tile.lanes;
    for (int32_t i = 0; i < outer; ++i) {
      const auto* row = tile.first + i * outer_stride;
      const auto shows = [&](int32_t j, int64_t stride) {
        return static_cast<int32_t>(mask_value<A>(row[j * stride]) != kHiddenScore<A>);
      };
      int32_t any = 0;
      if (inner_stride == 1) {
#pragma omp simd reduction(| : any)
        for (int32_t j = 0; j < inner; ++j) any |= shows(j, 1);
      } else {
        for (int32_t j = 0; j < inner; ++j) any |= shows(j, inner_stride);
      }
      if (any != 0) return false;
    }
    return true;
  });
}

// What `count` elements of a mask, `stride` apart, add to scores.
template <typename A, typename M>
static inline void load_mask(const M* from, int64_t stride, int32_t count, A* to) {
  if (stride == 0) {
    std::fill_n(to, count, mask_value<A>(*from));
  } else if (stride == 1) {
#pragma omp simd
    for (int32_t i = 0; i < count; ++i) to[i] = mask_value<A>(from[i]);
  } else {
    for (int32_t i = 0; i < count; ++i) to[i] = mask_value<A>(from[i * stride]);
  }
}

// f(other, lane, vector) for all of a tile's part of a mask, in whole vectors along whichever of
// its dimensions is contiguous. Lanes behind the last get zeros.
template <typename A, typename M, typename F>
static inline void for_mask_vectors(const MaskTile<M>& tile, const F& f) {
  using Vector = typename VectorOf<A>::type;
  constexpr int32_t kCount = static_cast<int32_t>(kLanes<A>);
  if (tile.other_stride == 1 && tile.lane_stride > 1) {
    alignas(64) A rows[kCount][kOtherRows] = {};
    for (int32_t lane = 0; lane < tile.lanes; lane += kCount) {
      const int32_t count = std::min(kCount, tile.lanes - lane);
      for (int32_t i = 0; i < count; ++i) {
        load_mask(tile.first + (lane + i) * tile.lane_stride, 1, tile.others, rows[i]);
      }
      transpose<A>(
          count, tile.others,
          [&](int64_t i, int64_t j) { return *reinterpret_cast<const Vector*>(rows[i] + j); },
          [&](int64_t j, int64_t i, const Vector& vector) { f(j, lane + i, vector); });
    }
    return;
  }
  alignas(64) A lanes[kOwnRows<A>] = {};
  for (int32_t j = 0; j < tile.others; ++j) {
    load_mask(tile.first + j * tile.other_stride, tile.lane_stride, tile.lanes, lanes);
    for (int32_t i = 0; i < tile.lanes; i += kCount) {
      f(j, i, *reinterpret_cast<const Vector*>(lanes + i));
    }
  }
}

// Hides what of a tile lies behind the mask's last row and column.
template <typename A, bool kOwnsQueries>
static void hide_beyond(const TilePlace<kOwnsQueries>& part, const TilePlace<kOwnsQueries>& whole,
                        A* scores) {
  const bool is_whole = part.own_rows == whole.own_rows && part.other_rows == whole.other_rows;
  for (int32_t j = 0; !is_whole && j < whole.other_rows; ++j) {
    A* of_other = scores + j * kOwnRows<A>;
    std::fill(of_other + (j < part.other_rows ? part.own_rows : 0), of_other + whole.own_rows,
              kHiddenScore<A>);
  }
}

template <typename A, bool kOwnsQueries>
static void mask_tile(const AttentionMask& mask, const TilePlace<kOwnsQueries>& whole, A* scores) {
  using Vector = typename VectorOf<A>::type;
  const TilePlace<kOwnsQueries> place = within_mask(mask, whole);
  hide_beyond(place, whole, scores);
  if (place.other_rows == 0) return;
  visit_mask(mask, [&](auto element) {
    using M = decltype(element);
    for_mask_vectors<A>(MaskTile<M>(mask, place), [&](int64_t j, int64_t i, const Vector& value) {
      Vector& score = *reinterpret_cast<Vector*>(scores + j * kOwnRows<A> + i);
      if constexpr (std::is_same_v<M, uint8_t>) {
        // Not a sum: a hidden score is hidden even if it is NaN.
        score = value < 0 ? value : score;
      } else {
        score += value;
      }
    });
  });
}

// Hides the lanes that lie outside the band.
template <typename A, bool kOwnsQueries>
static void band_lanes(const Band& band, const TilePlace<kOwnsQueries>& tile, int32_t j,
                       A* scores) {
  const Range lanes = lanes_seen(band, tile, j, j);
  std::fill(scores, scores + lanes.begin, kHiddenScore<A>);
  std::fill(scores + lanes.end, scores + tile.own_rows, kHiddenScore<A>);
}

// Turns the products q . k in `scores` into final scores, and gives their derivatives by the scaled
// products in `maybe_slopes`, which only a softcap fills. Lanes beyond own_rows hold what they may:
// nothing reads their results.
template <typename A, bool kOwnsQueries>
static void final_scores(const AttentionProblem& p, const Band& band,
                         const TilePlace<kOwnsQueries>& tile, A* scores, A* maybe_slopes) {
  const bool is_cut = band_cuts(band, tile, tile.other_rows, tile.own_rows);
  const A scale = p.scale.as<A>(), softcap = p.softcap.as<A>();
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
  if (p.mask.kind != MaskKind::kNone) mask_tile(p.mask, tile, scores);
  for (int32_t j = 0; is_cut && j < tile.other_rows; ++j) {
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
