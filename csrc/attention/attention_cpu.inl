// Attention on the CPU, once per instruction set (see attention_cpu.cpp).
//
// The same two tile products as on the GPU, with the rows of the "own" operand as the lanes of the
// vector registers:
//
//   pairs[j][i]  = other[j] . own[i]             own is packed transposed, once per task
//   result[d][i] += sum_j values[j][d] * weights[j][i]
//
// so that the other operand is read as it lies in memory and the softmax, whose rows are lanes,
// needs no reduction across a register. A task is one tile of own rows of one head; queries own the
// forward pass and grad_q, keys own grad_k and grad_v. Every sum has one order: results do not
// depend on the number of threads, nor a row's on the rows beside it.

// Own rows of a task: two stripes of three registers in block_gemm.
template <typename A>
constexpr int32_t kOwnRows = 6 * static_cast<int32_t>(kLanes<A>);
constexpr int32_t kOtherRows = 64;

// One head of a [B, H, S, D] tensor.
template <typename T>
struct HeadMatrix {
  const T* data;
  int64_t row_stride;
  int32_t columns;
};

template <typename T>
static HeadMatrix<T> head_matrix(const void* data, const HeadStrides& strides, int64_t batch,
                                 int64_t head, int32_t columns) {
  return {static_cast<const T*>(data) + batch * strides.batch + head * strides.head, strides.row,
          columns};
}

// packed[d * kOwnRows + i] = matrix[row + i][d]; lanes beyond `rows` are zero.
template <typename T, typename A>
static void pack_transposed(const HeadMatrix<T>& matrix, int32_t row, int32_t rows, A* packed) {
  constexpr int32_t kRows = kOwnRows<A>;
  for (int32_t i = 0; i < rows; ++i) {
    const T* source = matrix.data + (row + i) * matrix.row_stride;
    for (int32_t d = 0; d < matrix.columns; ++d) packed[d * kRows + i] = load(source[d]);
  }
  for (int32_t i = rows; i < padded<A>(rows); ++i) {
    for (int32_t d = 0; d < matrix.columns; ++d) packed[d * kRows + i] = 0;
  }
}

// result[i][d] = packed[d * kOwnRows + i] * row_scale[i].
template <typename T, typename A>
static void store_transposed(const A* packed, const A* row_scale, int32_t rows, int32_t columns,
                             T* result, int64_t row_stride) {
  for (int32_t i = 0; i < rows; ++i) {
    T* target = result + i * row_stride;
    for (int32_t d = 0; d < columns; ++d) {
      target[d] = store<T>(packed[d * kOwnRows<A> + i] * row_scale[i]);
    }
  }
}

// Rows of an operand in the accumulator's type: where they lie, or converted into a buffer.
template <typename A>
struct TileRows {
  const A* data;
  int64_t row_stride;
};

template <typename T, typename A>
static TileRows<A> tile_rows(const HeadMatrix<T>& matrix, int32_t row, int32_t rows, A* buffer) {
  const T* source = matrix.data + row * matrix.row_stride;
  if constexpr (std::is_same_v<T, A>) {
    return {source, matrix.row_stride};
  } else {
    for (int32_t j = 0; j < rows; ++j) {
      const T* from = source + j * matrix.row_stride;
      A* to = buffer + static_cast<int64_t>(j) * matrix.columns;
#pragma omp simd
      for (int32_t d = 0; d < matrix.columns; ++d) to[d] = load(from[d]);
    }
    return {buffer, matrix.columns};
  }
}

// pairs[j][i] = other[j] . own[i].
template <typename A>
static void pair_products(const TileRows<A>& other, int32_t other_rows, const A* own,
                          int32_t own_rows, int32_t depth, A* pairs) {
  block_gemm<A>(other_rows, own_rows, depth, other.data, other.row_stride, 1, own, kOwnRows<A>,
                pairs, kOwnRows<A>, false);
}

// result[d][i] += sum_j values[j][d] * weights[j][i].
template <typename A>
static void accumulate(const TileRows<A>& values, int32_t value_rows, const A* weights,
                       int32_t own_rows, int32_t columns, A* result) {
  block_gemm<A>(columns, own_rows, value_rows, values.data, 1, values.row_stride, weights,
                kOwnRows<A>, result, kOwnRows<A>, true);
}

// Where a tile of the score matrix lies. Lanes are its queries where queries own, else its keys.
template <bool kOwnsQueries>
struct TilePlace {
  int32_t batch, head, own_row, own_rows, other_row, other_rows;

  int32_t row(int32_t lane, int32_t j) const {
    return kOwnsQueries ? own_row + lane : other_row + j;
  }
  int32_t column(int32_t lane, int32_t j) const {
    return kOwnsQueries ? other_row + j : own_row + lane;
  }
};

// Turns the products q . k in `scores` into masked scores. Lanes beyond own_rows are left as they
// are: nothing reads their results.
template <typename A, bool kOwnsQueries>
static void mask_scores(const AttentionProblem& p, const TilePlace<kOwnsQueries>& tile, A* scores) {
  const int32_t first_row = kOwnsQueries ? tile.own_row : tile.other_row;
  const int32_t last_column =
      kOwnsQueries ? tile.other_row + tile.other_rows - 1 : tile.own_row + tile.own_rows - 1;
  const bool plain = p.mask.kind == MaskKind::kNone && (!p.causal || last_column <= first_row);
  const A scale = static_cast<A>(p.scale);
  for (int32_t j = 0; j < tile.other_rows; ++j) {
    A* of_other = scores + j * kOwnRows<A>;
    if (plain) {
#pragma omp simd
      for (int32_t i = 0; i < kOwnRows<A>; ++i) of_other[i] *= scale;
    } else {
      for (int32_t i = 0; i < tile.own_rows; ++i) {
        of_other[i] =
            masked_score(p, tile.batch, tile.head, tile.row(i, j), tile.column(i, j), of_other[i]);
      }
    }
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

// The online softmax: scores become exp(score - max), and what there is of the result is rescaled
// to the new maximum.
template <typename A>
static void softmax_step(int32_t other_rows, int32_t columns, A* scores, A* max, A* sum,
                         A* result) {
  constexpr int32_t kRows = kOwnRows<A>;
  constexpr A kHidden = -std::numeric_limits<A>::infinity();
  alignas(64) A new_max[kRows], shift[kRows], factor[kRows];
  std::memcpy(new_max, max, sizeof(new_max));
  for (int32_t j = 0; j < other_rows; ++j) {
    const A* of_key = scores + j * kRows;
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i)
      new_max[i] = of_key[i] > new_max[i] ? of_key[i] : new_max[i];
  }
  bool changed = false;
#pragma omp simd reduction(| : changed)
  for (int32_t i = 0; i < kRows; ++i) {
    // A row without a key so far has no maximum: anything finite will do, its weights are 0.
    shift[i] = new_max[i] == kHidden ? A(0) : new_max[i];
    factor[i] = vector_exp(max[i] - shift[i]);
    sum[i] *= factor[i];
    changed |= factor[i] != A(1);
  }
  std::memcpy(max, new_max, sizeof(new_max));
  for (int32_t j = 0; j < other_rows; ++j) {
    A* of_key = scores + j * kRows;
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i) {
      of_key[i] = vector_exp(of_key[i] - shift[i]);
      sum[i] += of_key[i];
    }
  }
  if (!changed) return;
  for (int32_t d = 0; d < columns; ++d) {
#pragma omp simd
    for (int32_t i = 0; i < kRows; ++i) result[d * kRows + i] *= factor[i];
  }
}

template <typename T, typename A = Accumulator<T>>
static void forward_tasks(const AttentionForwardParams& p, int64_t begin, int64_t end) {
  constexpr int32_t kRows = kOwnRows<A>;
  const int32_t tiles = (p.seqlen_q + kRows - 1) / kRows;
  const int32_t group = p.num_heads / p.num_heads_kv;
  const Scratch<A> own(int64_t{p.head_dim} * kRows), scores(int64_t{kOtherRows} * kRows),
      result(int64_t{p.head_dim_v} * kRows), buffer(int64_t{kOtherRows} * kMaxHeadDim);
  alignas(64) A max[kRows], sum[kRows], row_scale[kRows];

  for (int64_t task = begin; task < end; ++task) {
    const int32_t own_row = static_cast<int32_t>(task % tiles) * kRows;
    const int32_t head = static_cast<int32_t>(task / tiles % p.num_heads);
    const int32_t batch = static_cast<int32_t>(task / tiles / p.num_heads);
    const int32_t rows = std::min(kRows, p.seqlen_q - own_row);
    const auto q = head_matrix<T>(p.q, p.q_strides, batch, head, p.head_dim);
    const auto k = head_matrix<T>(p.k, p.k_strides, batch, head / group, p.head_dim);
    const auto v = head_matrix<T>(p.v, p.v_strides, batch, head / group, p.head_dim_v);
    pack_transposed(q, own_row, rows, own.data());
    // Lanes beyond `rows` compute on what they find; start them clean so that it is cheap.
    std::fill_n(scores.data(), kOtherRows * kRows, A(0));
    std::fill_n(result.data(), int64_t{p.head_dim_v} * kRows, A(0));
    std::fill_n(max, kRows, -std::numeric_limits<A>::infinity());
    std::fill_n(sum, kRows, A(0));

    const int32_t key_end = visible_keys(p, own_row + rows - 1);
    for (int32_t key = 0; key < key_end; key += kOtherRows) {
      const TilePlace<true> tile{batch, head, own_row,
                                 rows,  key,  std::min(kOtherRows, key_end - key)};
      pair_products(tile_rows(k, key, tile.other_rows, buffer.data()), tile.other_rows, own.data(),
                    rows, p.head_dim, scores.data());
      mask_scores(p, tile, scores.data());
      softmax_step(tile.other_rows, p.head_dim_v, scores.data(), max, sum, result.data());
      multiply_by_dropout(p, tile, scores.data());
      accumulate(tile_rows(v, key, tile.other_rows, buffer.data()), tile.other_rows, scores.data(),
                 rows, p.head_dim_v, result.data());
    }

    const int64_t first = (int64_t{batch} * p.num_heads + head) * p.seqlen_q + own_row;
    A* lse = static_cast<A*>(p.lse) + first;
    for (int32_t i = 0; i < rows; ++i) {
      const bool no_key = sum[i] == 0;
      row_scale[i] = no_key ? A(0) : 1 / sum[i];
      lse[i] = no_key ? -std::numeric_limits<A>::infinity() : max[i] + std::log(sum[i]);
    }
    T* out = static_cast<T*>(p.out) + batch * p.out_strides.batch + head * p.out_strides.head +
             own_row * p.out_strides.row;
    store_transposed(result.data(), row_scale, rows, p.head_dim_v, out, p.out_strides.row);
  }
}

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

// Scores become keep * p, and dots = grad_out . v become ds / scale. Hidden keys get zeros, not
// even a NaN.
template <typename A, bool kOwnsQueries>
static void backward_weights(const AttentionBackwardParams& p, const TilePlace<kOwnsQueries>& tile,
                             A* scores, A* dots) {
  constexpr A kHidden = -std::numeric_limits<A>::infinity();
  const int64_t row_base = (int64_t{tile.batch} * p.num_heads + tile.head) * p.seqlen_q;
  const A* lse = static_cast<const A*>(p.lse) + row_base;
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
      const bool hidden = of_score[i] == kHidden;
      const A probability = vector_exp(of_score[i] - lse[row]);
      of_score[i] = hidden ? A(0) : keep[i] * probability;
      of_dot[i] = hidden ? A(0) : probability * (keep[i] * of_dot[i] - delta[row]);
    }
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
  const Scratch<A> own(int64_t{p.head_dim} * kRows), own_v(int64_t{p.head_dim_v} * kRows),
      scores(int64_t{kOtherRows} * kRows), dots(int64_t{kOtherRows} * kRows),
      result(int64_t{p.head_dim} * kRows), result_v(int64_t{p.head_dim_v} * kRows),
      buffer(int64_t{kOtherRows} * kMaxHeadDim), buffer_v(int64_t{kOtherRows} * kMaxHeadDim);
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
      const int32_t other_begin =
          kOwnsQueries ? 0 : first_row_seeing(p, own_row) / kOtherRows * kOtherRows;
      const int32_t other_end = kOwnsQueries ? visible_keys(p, own_row + rows - 1) : p.seqlen_q;
      for (int32_t other_row = other_begin; other_row < other_end; other_row += kOtherRows) {
        const TilePlace<kOwnsQueries> tile{
            batch, head, own_row, rows, other_row, std::min(kOtherRows, other_end - other_row)};
        const auto other =
            tile_rows(kOwnsQueries ? k : q, other_row, tile.other_rows, buffer.data());
        const auto other_v =
            tile_rows(kOwnsQueries ? v : grad_out, other_row, tile.other_rows, buffer_v.data());
        pair_products(other, tile.other_rows, own.data(), rows, p.head_dim, scores.data());
        pair_products(other_v, tile.other_rows, own_v.data(), rows, p.head_dim_v, dots.data());
        mask_scores(p, tile, scores.data());
        backward_weights(p, tile, scores.data(), dots.data());
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
      store_gradient(result.data(), p.scale, p.grad_q, p.grad_q_strides, p.head_dim);
    } else {
      store_gradient(result.data(), p.scale, p.grad_k, p.grad_k_strides, p.head_dim);
      store_gradient(result_v.data(), 1.0, p.grad_v, p.grad_v_strides, p.head_dim_v);
    }
  }
}

template <typename A>
static int64_t num_tasks(int64_t batch, int64_t heads, int64_t rows) {
  return batch * heads * ((rows + kOwnRows<A> - 1) / kOwnRows<A>);
}

static Status attention_forward(const AttentionForwardParams& p) {
  return visit_dtype(p.dtype, [&](auto element) -> Status {
    using T = decltype(element);
    parallel_for(0, num_tasks<Accumulator<T>>(p.batch, p.num_heads, p.seqlen_q), 1,
                 [&](int64_t begin, int64_t end) { forward_tasks<T>(p, begin, end); });
    return nullptr;
  });
}

static Status attention_backward(const AttentionBackwardParams& p) {
  return visit_dtype(p.dtype, [&](auto element) -> Status {
    using T = decltype(element);
    using A = Accumulator<T>;
    constexpr int64_t kDeltaGrain = 256;
    parallel_for(0, int64_t{p.batch} * p.num_heads * p.seqlen_q, kDeltaGrain,
                 [&](int64_t begin, int64_t end) { delta_rows<T>(p, begin, end); });
    parallel_for(0, num_tasks<A>(p.batch, p.num_heads, p.seqlen_q), 1,
                 [&](int64_t begin, int64_t end) { backward_tasks<true, T>(p, begin, end); });
    parallel_for(0, num_tasks<A>(p.batch, p.num_heads_kv, p.seqlen_k), 1,
                 [&](int64_t begin, int64_t end) { backward_tasks<false, T>(p, begin, end); });
    return nullptr;
  });
}
