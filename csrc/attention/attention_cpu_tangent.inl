// Attention and its tangent on the CPU, in one pass: the tiles and tasks of the forward pass, and
// beside each of its products those of the tangents. Part of attention_cpu.inl.

template <typename T>
struct TangentPass {
  using Element = T;
  using Params = AttentionTangentParams;
  using A = Accumulator<T>;
  using E = Operand<T>;
  static constexpr int32_t kRows = kOwnRows<A>;

  TangentPass(const Params& params, int32_t num_tiles)
      : p(params),
        keys(p),
        key_tangents(p),
        q_lanes(2 * num_tiles * q_size(p)),
        weights(kOtherRows * kRows),
        scores(kOtherRows * kRows),
        tangents(kOtherRows * kRows),
        slopes(p.softcap.as<A>() != 0 ? kOtherRows * kRows : 0),
        buffer(tile_size<A>(p.head_dim_v)) {
    std::fill_n(scores.data(), kOtherRows * kRows, A(0));
    std::fill_n(tangents.data(), kOtherRows * kRows, A(0));
  }

  static int64_t q_size(const Params& p) { return ForwardPass<T>::q_size(p); }
  // What the softmax rescales, the sums of the output, of its tangent, and of the weights before
  // this tile of keys; then the mean of the scores' tangents, and its rest.
  static int32_t rescaled_columns(const Params& p) { return 2 * p.head_dim_v + 1; }
  static int64_t result_columns(const Params& p) { return rescaled_columns(p) + 2; }
  static bool leaves_out(const Sequence&) { return false; }
  A* tangent_sums(const QueryTile<T>& tile) const { return tile.result + p.head_dim_v * kRows; }
  A* sum_before(const QueryTile<T>& tile) const { return tile.result + 2 * p.head_dim_v * kRows; }
  A* mean_of_tangents(const QueryTile<T>& tile) const { return sum_before(tile) + kRows; }
  A* rest_of_mean(const QueryTile<T>& tile) const { return sum_before(tile) + 2 * kRows; }
  E* tangent_lanes(const QueryTile<T>& tile) const { return tile.q + q_size(p); }

  void begin(const Sequence& sequence, int32_t head, int32_t index, QueryTile<T>& tile) {
    tile.q = q_lanes.data() + 2 * index * q_size(p);
    keys.pack_queries(p, sequence, head, tile.row, tile.rows, tile.q);
    if (p.tangents.q == nullptr) return;
    keys.pack_queries(p.tangents, sequence, head, tile.row, tile.rows, tangent_lanes(tile));
  }
  void load(const Sequence& sequence, int32_t head_kv, int32_t key, int32_t rows) {
    k = keys.load_k(p, sequence, head_kv, key, rows);
    v = keys.load_v(p, sequence, head_kv, key, rows);
    if (p.tangents.k != nullptr) {
      k_tangent = key_tangents.load_k(p.tangents, sequence, head_kv, key, rows);
    }
    if (p.tangents.v != nullptr) {
      v_tangent = key_tangents.load_v(p.tangents, sequence, head_kv, key, rows);
    }
  }

  // The scores of a tile and their tangents, which are zero where the score is hidden.
  void make_scores(const Band& band, const TilePlace<true>& place, const TileBlocks& blocks,
                   const QueryTile<T>& tile) {
    const int32_t rows = place.other_rows;
    A *score = scores.data(), *tangent = tangents.data();
    pair_products(k, tile.q, blocks, p.head_dim, score);
    const bool has_q = p.tangents.q != nullptr, has_k = p.tangents.k != nullptr;
    if (has_q) pair_products(k, tangent_lanes(tile), blocks, p.head_dim, tangent);
    if (has_k) pair_products(k_tangent, tile.q, blocks, p.head_dim, tangent, has_q);
    if (!has_q && !has_k) std::fill_n(tangent, rows * kRows, A(0));
    final_scores<A>(p, band, place, score, slopes.data());
    if (p.softcap.as<A>() != 0) multiply_by_slopes(rows, slopes.data(), tangent);
    final_scores<A>(p.tangents, band, place, tangent, nullptr);
#pragma omp simd
    for (int32_t i = 0; i < rows * kRows; ++i) {
      tangent[i] = score[i] == kHiddenScore<A> ? A(0) : tangent[i];
    }
  }

  // Takes so many times the sums of the output from those of its tangent.
  void take_from_tangent(const QueryTile<T>& tile, const A* times) {
    A* sums = tangent_sums(tile);
    for (int32_t d = 0; d < p.head_dim_v; ++d) {
#pragma omp simd
      for (int32_t i = 0; i < kRows; ++i) {
        sums[d * kRows + i] -= times[i] * tile.result[d * kRows + i];
      }
    }
  }

  // Moves the mean of a row's tangents for a tile of keys, and with it what there is of the sums
  // that are counted from it; then counts the tile's tangents from there.
  void move_mean(int32_t rows, const A* weight, const QueryTile<T>& tile, A* tangent) {
    A *mean = mean_of_tangents(tile), *rest = rest_of_mean(tile), *before = sum_before(tile);
    alignas(64) A move[kRows] = {}, of_tile[kRows] = {};
    for (int32_t j = 0; j < rows; ++j) {
#pragma omp simd
      for (int32_t i = 0; i < kRows; ++i) {
        of_tile[i] += weight[j * kRows + i] * (tangent[j * kRows + i] - mean[i]);
      }
    }
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i) {
      move[i] = mean_move(mean[i], of_tile[i], tile.sum[i]);
      mean[i] += move[i];
      of_tile[i] = 0;
    }
    for (int32_t j = 0; j < rows; ++j) {
#pragma omp simd
      for (int32_t i = 0; i < kRows; ++i) {
        tangent[j * kRows + i] -= mean[i];
        of_tile[i] += weight[j * kRows + i] * tangent[j * kRows + i];
      }
    }
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i) {
      rest[i] = mean_rest(rest[i], move[i], before[i], of_tile[i], tile.sum[i]);
      before[i] = tile.sum[i];
    }
    take_from_tangent(tile, move);
  }

  void step(const Band& band, const TilePlace<true>& place, QueryTile<T>& tile) {
    const int32_t rows = place.other_rows;
    A *weight = scores.data(), *tangent = tangents.data();
    const TileBlocks blocks = seen_blocks<A>(band, place);
    make_scores(band, place, blocks, tile);
    softmax_step(tile.rows, rows, rescaled_columns(p), weight, tile.max, tile.sum, tile.result);
    move_mean(rows, weight, tile, tangent);
    multiply_by_dropout(p, place, weight);
    const E* kept = weights_over_rows(weight, rows, weights.data());
    accumulate(v, kept, blocks, p.head_dim_v, tile.result);
    if (p.tangents.v != nullptr) {
      accumulate(v_tangent, kept, blocks, p.head_dim_v, tangent_sums(tile));
    }
#pragma omp simd
    for (int32_t i = 0; i < rows * kRows; ++i) tangent[i] *= weight[i];
    accumulate(v, weights_over_rows(tangent, rows, weights.data()), blocks, p.head_dim_v,
               tangent_sums(tile));
  }

  void finish(const Sequence& sequence, int32_t head, const QueryTile<T>& tile) {
    RowEnd<A> ends[kRows];
    finish_tile(p, sequence, head, tile, buffer.data(), ends);
    A row_scale[kRows], beyond[kRows] = {};
    A* lse = static_cast<A*>(p.lse_tangent) + row_of_all(p, sequence, head, tile.row);
    for (int32_t i = 0; i < tile.rows; ++i) {
      const TangentMean<A> mean{mean_of_tangents(tile)[i], rest_of_mean(tile)[i]};
      beyond[i] = beyond_mean(p, head, ends[i].stats, mean);
      row_scale[i] = ends[i].scale;
      lse[i] = mean.mean + beyond[i];
    }
    take_from_tangent(tile, beyond);
    T* target = query_rows(static_cast<T*>(p.out_tangent), p.out_tangent_strides, sequence, head);
    store_lanes(tangent_sums(tile), row_scale, tile.rows, p.head_dim_v, buffer.data(),
                target + tile.row * p.out_tangent_strides.row, p.out_tangent_strides.row);
  }

  const Params& p;
  const KeyBuffers<T> keys, key_tangents;
  const Scratch<E> q_lanes, weights;
  const Scratch<A> scores, tangents, slopes, buffer;
  TileRows<E> k, v, k_tangent, v_tangent;
};
