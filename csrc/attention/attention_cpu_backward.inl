// Attention backward on the CPU: grad_q, grad_k and grad_v from one pass over the score matrix of a
// head, tile of keys by tile of keys. Part of attention_cpu.inl.
//
// Where there are fewer heads than threads could take, a pass of its own makes grad_q, with the
// scores computed again: then tasks are tiles of keys, and groups of queries. Both ways add up the
// same numbers in the same order.

// What a tile of keys brings along, and what a thread works on.
template <typename T>
struct BackwardScratch {
  using A = Accumulator<T>;
  using E = Operand<T>;

  explicit BackwardScratch(const AttentionProblem& p)
      : k_lanes(int64_t{kOwnRows<A>} * num_elements<E>(p.head_dim)),
        v_lanes(int64_t{kOwnRows<A>} * num_elements<E>(p.head_dim_v)),
        k_rows(tile_size<E>(p.head_dim)),
        q_columns(tile_size<E>(p.head_dim)),
        q_rows(tile_size<E>(p.head_dim)),
        grad_out_columns(tile_size<E>(p.head_dim_v)),
        grad_out_rows(tile_size<E>(p.head_dim_v)),
        weights(p),
        elements(kOtherRows * kOwnRows<A>),
        grad_k(int64_t{kOwnRows<A>} * p.head_dim),
        grad_v(int64_t{kOwnRows<A>} * p.head_dim_v),
        out(tile_size<A>(std::max(p.head_dim, p.head_dim_v))) {}

  const Scratch<E> k_lanes, v_lanes, k_rows, q_columns, q_rows, grad_out_columns, grad_out_rows;
  const WeightsTile<A> weights;
  const Scratch<E> elements;        // weights again, as operands
  const Scratch<A> grad_k, grad_v;  // [D][kOwnRows], [Dv][kOwnRows]
  const Scratch<A> out;
};

// One query head of a sequence, and what is wanted of it.
struct BackwardHead {
  Sequence sequence;
  Band band;
  int32_t head, head_kv;
  bool wants_kv;
};

// A tile of keys as lanes, and its rows for grad_q.
template <typename T>
struct KeyTile {
  int32_t row, rows;
  TileRows<Operand<T>> k_rows;
};

template <typename T>
static KeyTile<T> load_keys(const AttentionBackwardParams& p, const BackwardHead& h, int32_t row,
                            const BackwardScratch<T>& scratch) {
  using E = Operand<T>;
  const int32_t rows = std::min(kOwnRows<Accumulator<T>>, h.sequence.seqlen_k - row);
  const auto k = key_matrix<T>(p.k, p.k_strides, h.sequence, h.head_kv, p.head_dim);
  const auto v = key_matrix<T>(p.v, p.v_strides, h.sequence, h.head_kv, p.head_dim_v);
  const TileForms<E> k_tile =
      over_both(k, row, rows, scratch.q_columns.data(), scratch.k_rows.data());
  pack_lanes(k_tile.over_columns, rows, num_elements<E>(p.head_dim), scratch.k_lanes.data());
  pack_lanes(over_columns(v, row, rows, scratch.grad_out_columns.data()), rows,
             num_elements<E>(p.head_dim_v), scratch.v_lanes.data());
  return {row, rows, k_tile.over_rows};
}

// Takes the queries row .. end of a head, at most kOtherRows, into a tile of keys: adds to its
// grad_k and grad_v, and to `maybe_grad_q`, their rows of [S, padded(D)].
template <typename T>
static void backward_step(const AttentionBackwardParams& p, const BackwardHead& h,
                          const KeyTile<T>& keys, int32_t row, int32_t end,
                          const BackwardScratch<T>& scratch, Accumulator<T>* maybe_grad_q) {
  using E = Operand<T>;
  const int32_t rows = end - row;
  const auto q = query_matrix<T>(p.q, p.q_strides, h.sequence, h.head, p.head_dim);
  const auto grad_out =
      query_matrix<T>(p.grad_out, p.grad_out_strides, h.sequence, h.head, p.head_dim_v);
  const TilePlace<false> tile{h.sequence, h.head, keys.row, keys.rows, row, rows};
  if (mask_hides<Accumulator<T>>(p.mask, tile)) return;
  const auto forms = [&](const HeadMatrix<T>& matrix, E* columns_buffer, E* rows_buffer) {
    return h.wants_kv ? over_both(matrix, row, rows, columns_buffer, rows_buffer)
                      : TileForms<E>{over_columns(matrix, row, rows, columns_buffer), {}};
  };
  const TileForms<E> q_tile = forms(q, scratch.q_columns.data(), scratch.q_rows.data());
  const TileForms<E> grad_out_tile =
      forms(grad_out, scratch.grad_out_columns.data(), scratch.grad_out_rows.data());
  const TileBlocks blocks = seen_blocks<Accumulator<T>>(h.band, tile);
  tile_weights(p, h.band, tile, blocks, q_tile.over_columns, grad_out_tile.over_columns,
               scratch.k_lanes.data(), scratch.v_lanes.data(), scratch.weights);
  Accumulator<T>*scores = scratch.weights.scores.data(), *dots = scratch.weights.dots.data();
  if (p.softcap.as<Accumulator<T>>() != 0)
    multiply_by_slopes(rows, scratch.weights.slopes.data(), dots);
  if (h.wants_kv) {
    accumulate(grad_out_tile.over_rows, weights_over_rows(scores, rows, scratch.elements.data()),
               blocks, p.head_dim_v, scratch.grad_v.data());
    accumulate(q_tile.over_rows, weights_over_rows(dots, rows, scratch.elements.data()), blocks,
               p.head_dim, scratch.grad_k.data());
  }
  if (maybe_grad_q != nullptr) {
    accumulate_rows(weights_over_lanes(dots, rows, scratch.elements.data()), keys.k_rows, blocks,
                    p.head_dim, maybe_grad_q);
  }
}

// Takes those of the queries `rows` that see any of a tile of keys into it, in tiles that lie where
// they do in any task: what a hidden NaN spreads to must not depend on tasks. `maybe_grad_q` begins
// with the first of `rows`.
template <typename T>
static void backward_key_tile(const AttentionBackwardParams& p, const BackwardHead& h,
                              const KeyTile<T>& keys, const Range& rows,
                              const BackwardScratch<T>& scratch, Accumulator<T>* maybe_grad_q) {
  const Range seeing = rows_seeing(h.sequence, h.band, keys.row, keys.row + keys.rows - 1);
  const int32_t end = std::min(seeing.end, rows.end);
  const int32_t begin = std::max(seeing.begin / kOtherRows * kOtherRows, rows.begin);
  for (int32_t row = begin; row < end; row += kOtherRows) {
    backward_step(p, h, keys, row, std::min(row + kOtherRows, end), scratch,
                  maybe_grad_q == nullptr
                      ? nullptr
                      : maybe_grad_q + (row - rows.begin) * padded<Accumulator<T>>(p.head_dim));
  }
}

template <typename T, typename A = Accumulator<T>>
static void store_grad_kv(const AttentionBackwardParams& p, const BackwardHead& h,
                          const KeyTile<T>& keys, const BackwardScratch<T>& scratch) {
  const auto store_gradient = [&](const A* gradient, A scale, void* data,
                                  const HeadStrides& strides, int32_t columns) {
    A row_scale[kOwnRows<A>];
    std::fill_n(row_scale, keys.rows, scale);
    T* target = key_rows(static_cast<T*>(data), strides, h.sequence, h.head_kv);
    store_lanes(gradient, row_scale, keys.rows, columns, scratch.out.data(),
                target + keys.row * strides.row, strides.row);
  };
  store_gradient(scratch.grad_k.data(), p.scale.as<A>(), p.maybe_grad_k, p.grad_k_strides,
                 p.head_dim);
  store_gradient(scratch.grad_v.data(), A(1), p.maybe_grad_v, p.grad_v_strides, p.head_dim_v);
}

template <typename T, typename A = Accumulator<T>>
static void store_grad_q(const AttentionBackwardParams& p, const BackwardHead& h, const Range& rows,
                         const A* grad_q) {
  T* target = query_rows(static_cast<T*>(p.maybe_grad_q), p.grad_q_strides, h.sequence, h.head);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    store_row(grad_q + (row - rows.begin) * padded<A>(p.head_dim), p.scale.as<A>(), p.head_dim,
              target + row * p.grad_q_strides.row);
  }
}

// Tasks are key/value heads of sequences, each with the query heads that share it, one after the
// other. Between two of them the sums of grad_k and grad_v wait in `sums`.
template <typename T, typename A = Accumulator<T>>
static void backward_heads(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  const int32_t group = group_size(p);
  const int64_t k_size = int64_t{kOwnRows<A>} * p.head_dim,
                v_size = int64_t{kOwnRows<A>} * p.head_dim_v;
  const BackwardScratch<T> scratch(p);
  // Room for the longest sequence that there can be, of which no more than the own is touched.
  const Scratch<A> grad_q(int64_t{p.seqlen_q} * padded<A>(p.head_dim)),
      sums(group > 1 ? num_tiles<A>(p.seqlen_k) * (k_size + v_size) : 0);
  for (int64_t task = begin; task < end; ++task) {
    const Sequence sequence = sequence_of(p, static_cast<int32_t>(task / p.num_heads_kv));
    BackwardHead h{sequence, visible_band(p, sequence), 0,
                   static_cast<int32_t>(task % p.num_heads_kv), true};
    const Range rows{0, sequence.seqlen_q};
    const int64_t q_size = int64_t{sequence.seqlen_q} * padded<A>(p.head_dim);
    for (int32_t member = 0; member < group; ++member) {
      h.head = h.head_kv * group + member;
      std::fill_n(grad_q.data(), q_size, A(0));
      A* sum = sums.data();
      for (int32_t key = 0; key < sequence.seqlen_k; key += kOwnRows<A>, sum += k_size + v_size) {
        const KeyTile<T> keys = load_keys(p, h, key, scratch);
        if (member == 0) {
          std::fill_n(scratch.grad_k.data(), k_size, A(0));
          std::fill_n(scratch.grad_v.data(), v_size, A(0));
        } else {
          std::copy_n(sum, k_size, scratch.grad_k.data());
          std::copy_n(sum + k_size, v_size, scratch.grad_v.data());
        }
        backward_key_tile(p, h, keys, rows, scratch, grad_q.data());
        if (member == group - 1) {
          store_grad_kv(p, h, keys, scratch);
        } else {
          std::copy_n(scratch.grad_k.data(), k_size, sum);
          std::copy_n(scratch.grad_v.data(), v_size, sum + k_size);
        }
      }
      store_grad_q<T>(p, h, rows, grad_q.data());
    }
  }
}

// Tasks are tiles of keys.
template <typename T, typename A = Accumulator<T>>
static void backward_key_tiles(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  const int32_t group = group_size(p);
  const BackwardScratch<T> scratch(p);
  for (int64_t task = begin; task < end; ++task) {
    const TaskPlace place = task_place(p, false, kOwnRows<A>, task);
    if (place.row >= place.sequence.seqlen_k) continue;
    BackwardHead h{place.sequence, visible_band(p, place.sequence), 0, place.head, true};
    const KeyTile<T> keys = load_keys(p, h, place.row, scratch);
    std::fill_n(scratch.grad_k.data(), int64_t{kOwnRows<A>} * p.head_dim, A(0));
    std::fill_n(scratch.grad_v.data(), int64_t{kOwnRows<A>} * p.head_dim_v, A(0));
    for (int32_t member = 0; member < group; ++member) {
      h.head = h.head_kv * group + member;
      backward_key_tile(p, h, keys, {0, place.sequence.seqlen_q}, scratch, nullptr);
    }
    store_grad_kv(p, h, keys, scratch);
  }
}

// Tasks are kQueriesOfTask queries: enough of them that packing the keys again costs little.
constexpr int32_t kQueriesOfTask = 4 * kOtherRows;

template <typename T, typename A = Accumulator<T>>
static void backward_queries(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  const int32_t group = group_size(p);
  const BackwardScratch<T> scratch(p);
  const int64_t q_size = kQueriesOfTask * padded<A>(p.head_dim);
  const Scratch<A> grad_q(q_size);
  for (int64_t task = begin; task < end; ++task) {
    const auto [sequence, head, row] = task_place(p, true, kQueriesOfTask, task);
    if (row >= sequence.seqlen_q) continue;
    const BackwardHead h{sequence, visible_band(p, sequence), head, head / group, false};
    const Range rows{row, std::min(row + kQueriesOfTask, sequence.seqlen_q)};
    std::fill_n(grad_q.data(), q_size, A(0));
    const Range keys = keys_seen_by(sequence, h.band, rows.begin, rows.end - 1);
    for (int32_t key = keys.begin / kOwnRows<A> * kOwnRows<A>; key < keys.end; key += kOwnRows<A>) {
      backward_key_tile(p, h, load_keys(p, h, key, scratch), rows, scratch, grad_q.data());
    }
    store_grad_q<T>(p, h, rows, grad_q.data());
  }
}

// grad_q, grad_k and grad_v, as far as they are wanted.
template <typename T>
static void backward_operands(const AttentionBackwardParams& p) {
  using A = Accumulator<T>;
  const int64_t heads_kv = num_sequences_and_rest(p) * p.num_heads_kv;
  const int64_t threads = num_threads();
  // Five products a tile, by as many heads at a time as there are threads, or seven by all threads.
  const int64_t turns = (heads_kv + threads - 1) / threads;
  const bool by_heads =
      p.maybe_grad_q != nullptr && p.maybe_grad_k != nullptr && 5 * turns * threads <= 7 * heads_kv;
  if (by_heads) {
    parallel_for(0, heads_kv, 1,
                 [&](int64_t begin, int64_t end) { backward_heads<T>(p, begin, end); });
    return;
  }
  if (p.maybe_grad_k != nullptr) {
    parallel_for(0, num_tasks(p, false, kOwnRows<A>), 1,
                 [&](int64_t begin, int64_t end) { backward_key_tiles<T>(p, begin, end); });
  }
  if (p.maybe_grad_q != nullptr) {
    parallel_for(0, num_tasks(p, true, kQueriesOfTask), 1,
                 [&](int64_t begin, int64_t end) { backward_queries<T>(p, begin, end); });
  }
}
