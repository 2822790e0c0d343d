// Attention forward on the CPU for sequences of a query or a few: bound by the reading of keys and
// values, which come from memory once for all rows that share them. Part of attention_cpu.inl.
//
// A task is a chunk of keys of a key/value head, of a size of its own, whatever the number of
// threads: one sequence fills the machine, and its result is the same in any batch. Keys own the
// tiles, as in the backward pass: few queries would leave lanes empty. What the chunks give is then
// put together in their order.

// With more of them, tiles that queries own have enough full lanes (measured on Emerald Rapids).
constexpr int32_t kQueriesOfDecode = 24;
static inline bool is_decoded(const Sequence& sequence) {
  return sequence.seqlen_q <= kQueriesOfDecode;
}

constexpr int32_t kTilesOfChunk = 4;
template <typename A>
constexpr int32_t kChunk = kTilesOfChunk * kOwnRows<A>;
template <typename A>
static int32_t num_chunks(const Sequence& sequence) {
  return (sequence.seqlen_k + kChunk<A> - 1) / kChunk<A>;
}

// What chunks of keys give to the rows that share them, those of a group's query heads, head by
// head: sums of exp(score - max) * v, of exp(score - max), and max.
template <typename A>
struct Partials {
  Partials(const AttentionProblem& p, int32_t rows_of_task, int64_t tasks)
      : most_rows(rows_of_task),
        columns(padded<A>(p.head_dim_v)),
        values(tasks * most_rows * columns),
        ends(tasks * most_rows * 2) {}

  A* result(int64_t task, int32_t row) const {
    return values.data() + (task * most_rows + row) * columns;
  }
  A& max(int64_t task, int32_t row) const { return ends.data()[(task * most_rows + row) * 2]; }
  A& sum(int64_t task, int32_t row) const { return ends.data()[(task * most_rows + row) * 2 + 1]; }

  const int64_t most_rows, columns;
  const Scratch<A> values, ends;
};

// Rows that are fetched ahead: for a new token 8 do best, 16 and 32 less well (Emerald Rapids).
constexpr int32_t kAhead = 8;

// A whole vector of a row, or `count` elements of one and zeros behind. The instructions that widen
// 16 bits are named: g++ takes five in place of one.
template <typename T, typename A = Accumulator<T>>
static inline typename VectorOf<A>::type load_vector(const T* from) {
  using Vector = typename VectorOf<A>::type;
  if constexpr (std::is_same_v<T, A>) {
    return *reinterpret_cast<const typename VectorOf<A>::unaligned_type*>(from);
  } else {
#if FUSED_VECTOR_BYTES == 64
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (std::is_same_v<T, Half>) return (Vector)_mm512_cvtph_ps(bits);
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif FUSED_VECTOR_BYTES == 32
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (std::is_same_v<T, Half>) return (Vector)_mm256_cvtph_ps(bits);
    return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    Vector vector;
    for (int64_t i = 0; i < kLanes<A>; ++i) vector[i] = load(from[i]);
    return vector;
#endif
  }
}
template <typename T, typename A = Accumulator<T>>
static inline typename VectorOf<A>::type load_vector(const T* from, int64_t count) {
  if (count >= kLanes<A>) return load_vector(from);
  typename VectorOf<A>::type lanes{};
  for (int64_t i = 0; i < count; ++i) lanes[i] = load(from[i]);
  return lanes;
}

// dots[j] = q . k[j] for the first `count` rows of k; q is padded with zeros. Whole vectors of dots
// are written.
template <typename T, typename A = Accumulator<T>>
static void dots_of_keys(const HeadMatrix<T>& k, int32_t count, const A* q, A* dots) {
  using Vector = typename VectorOf<A>::type;
  constexpr int32_t kCount = static_cast<int32_t>(kLanes<A>);
  for (int32_t j = 0; j < count; j += kCount) {
    Vector sums[kCount] = {};
    const T* first = k.row(j);
    for (int32_t i = 0; i < kCount; ++i) prefetch(k.row(j + i + kAhead), k.columns * sizeof(T));
    const auto of_q = [&](int32_t d) { return *reinterpret_cast<const Vector*>(q + d); };
    int32_t d = 0;
    if (count - j >= kCount) {
      for (; d + kCount <= k.columns; d += kCount) {
#pragma GCC unroll 16
        for (int32_t i = 0; i < kCount; ++i) {
          sums[i] += of_q(d) * load_vector(first + i * k.row_stride + d);
        }
      }
    }
    for (; d < k.columns; d += kCount) {
      for (int32_t i = 0; i < std::min(kCount, count - j); ++i) {
        sums[i] += of_q(d) * load_vector(first + i * k.row_stride + d, k.columns - d);
      }
    }
    transpose_stage<A, 1>(sums);
    Vector total = sums[0];
#pragma GCC unroll 16
    for (int32_t i = 1; i < kCount; ++i) total += sums[i];
    *reinterpret_cast<Vector*>(dots + j) = total;
  }
}

// kVectors vectors of result[d] += sum_j weights[j] * v[j][d], from column d on; of the last of
// them the columns that v has.
template <int32_t kVectors, typename T, typename A>
static void weigh_columns(const HeadMatrix<T>& v, int32_t count, const A* weights, int32_t d,
                          A* result) {
  using Vector = typename VectorOf<A>::type;
  const int64_t last = v.columns - d - (kVectors - 1) * kLanes<A>;
  Vector sums[kVectors] = {};
  for (int32_t j = 0; j < count; ++j) {
    const T* row = v.row(j) + d;
    prefetch(row + kAhead * v.row_stride, kVectors * kLanes<A> * sizeof(T));
#pragma GCC unroll 4
    for (int32_t i = 0; i < kVectors - 1; ++i) {
      sums[i] += weights[j] * load_vector(row + i * kLanes<A>);
    }
    sums[kVectors - 1] += weights[j] * load_vector(row + (kVectors - 1) * kLanes<A>, last);
  }
#pragma GCC unroll 4
  for (int32_t i = 0; i < kVectors; ++i) {
    *reinterpret_cast<Vector*>(result + d + i * kLanes<A>) += sums[i];
  }
}

template <typename T, typename A = Accumulator<T>>
static void weigh_values(const HeadMatrix<T>& v, int32_t count, const A* weights, A* result) {
  constexpr int32_t kVectors = 4, kStep = kVectors * static_cast<int32_t>(kLanes<A>);
  int32_t d = 0;
  for (; d + kStep - kLanes<A> < v.columns; d += kStep) {
    weigh_columns<kVectors>(v, count, weights, d, result);
  }
  for (; d < v.columns; d += kLanes<A>) weigh_columns<1>(v, count, weights, d, result);
}

// A row's scores, kOwnRows in each of some tiles, become exp(score - max).
template <typename A>
static void softmax_row(int32_t tiles, int64_t tile_size, A* scores, A& max, A& sum) {
  using Vector = typename VectorOf<A>::type;
  const auto vector = [&](int32_t tile, int32_t i) -> Vector& {
    return *reinterpret_cast<Vector*>(scores + tile * tile_size + i);
  };
  Vector maxima = Vector{} + kHiddenScore<A>, sums{};
  for (int32_t tile = 0; tile < tiles; ++tile) {
    for (int32_t i = 0; i < kOwnRows<A>; i += kLanes<A>) {
      maxima = vector(tile, i) > maxima ? vector(tile, i) : maxima;
    }
  }
  max = kHiddenScore<A>;
  for (int32_t i = 0; i < kLanes<A>; ++i) max = maxima[i] > max ? maxima[i] : max;
  const A shift = max == kHiddenScore<A> ? A(0) : max;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    for (int32_t i = 0; i < kOwnRows<A>; i += kLanes<A>) {
      vector(tile, i) = softmax_exp(vector(tile, i) - shift);
      sums += vector(tile, i);
    }
  }
  sum = 0;
  for (int32_t i = 0; i < kLanes<A>; ++i) sum += sums[i];
}

// What a thread works on, and what it does with a chunk.
template <typename T>
struct DecodePass {
  using A = Accumulator<T>;
  using E = Operand<T>;
  static constexpr int32_t kRows = kOwnRows<A>;

  DecodePass(const AttentionForwardParams& params, int32_t most_rows)
      : p(params),
        group(group_size(p)),
        q_stride(padded<E>(num_elements<E>(p.head_dim))),
        q(most_rows * q_stride),
        q_numbers(kRowsOfDots * padded<A>(p.head_dim)),
        k_lanes(int64_t{num_elements<E>(p.head_dim)} * kRows),
        buffer(tile_size<E>(std::max(p.head_dim, p.head_dim_v))),
        elements(most_rows * kRows),
        scores(kTilesOfChunk * most_rows * kRows),
        pages(p.maybe_block_table != nullptr ? kRows * std::max(p.head_dim, p.head_dim_v) : 0) {
    std::fill_n(scores.data(), kTilesOfChunk * most_rows * kRows, A(0));
  }

  // Takes the chunk that begins with `first_key` into the partials of `task`.
  void run(const Sequence& sequence, int32_t head_kv, int32_t first_key,
           const Partials<A>& partials, int64_t task) const {
    const int32_t queries = sequence.seqlen_q, rows = group * queries;
    std::fill_n(partials.result(task, 0), rows * partials.columns, A(0));
    const Band band = visible_band(p, sequence);
    const Range seen = keys_seen_by(sequence, band, 0, queries - 1);
    const Range keys{std::max(seen.begin, first_key), std::min(seen.end, first_key + kChunk<A>)};
    load_queries(sequence, head_kv, rows);

    const int64_t tile_size = int64_t{rows} * kRows;
    int32_t tiles = 0, key_of_tile[kTilesOfChunk];
    for (int32_t key = keys.begin; key < keys.end; key += kRows) {
      const int32_t count = std::min(kRows, keys.end - key);
      if (is_hidden(sequence, head_kv, key, count)) continue;
      A* tile = scores.data() + tiles * tile_size;
      key_of_tile[tiles++] = key;
      const auto k =
          cache_rows(p, p.k, p.k_strides, sequence, head_kv, p.head_dim, key, count, pages.data());
      multiply(k, count, rows, tile);
      for_heads(sequence, head_kv, key, count, tile,
                [&](const TilePlace<false>& place, A* of_head) {
                  final_scores<A>(p, band, place, of_head, nullptr);
                });
      for (int32_t r = 0; r < rows; ++r) {
        std::fill(tile + r * kRows + count, tile + (r + 1) * kRows, kHiddenScore<A>);
      }
    }
    for (int32_t r = 0; r < rows; ++r) {
      softmax_row(tiles, tile_size, scores.data() + r * kRows, partials.max(task, r),
                  partials.sum(task, r));
    }
    for (int32_t i = 0; i < tiles; ++i) {
      A* tile = scores.data() + i * tile_size;
      const int32_t key = key_of_tile[i], count = std::min(kRows, keys.end - key);
      for_heads(sequence, head_kv, key, count, tile,
                [&](const TilePlace<false>& place, A* of_head) {
                  multiply_by_dropout(p, place, of_head);
                });
      const auto v = cache_rows(p, p.v, p.v_strides, sequence, head_kv, p.head_dim_v, key, count,
                                pages.data());
      weigh(v, count, rows, tile, partials.columns, partials.result(task, 0));
    }
  }

 private:
  // So few rows are not worth turning the keys over, nor values that lie side by side.
  static constexpr int32_t kRowsOfDots = 3;

  void load_queries(const Sequence& sequence, int32_t head_kv, int32_t rows) const {
    for (int32_t r = 0; r < rows; ++r) {
      const int32_t head = head_kv * group + r / sequence.seqlen_q;
      const auto matrix = query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim);
      const T* row = matrix.row(r % sequence.seqlen_q);
      if (rows > kRowsOfDots) {
        copy_row(row, p.head_dim, q_stride, q.data() + r * q_stride);
      } else {
        const int64_t stride = padded<A>(p.head_dim);
        copy_row(row, p.head_dim, stride, q_numbers.data() + r * stride);
      }
    }
  }

  // Whether the mask hides a tile of keys from all rows.
  bool is_hidden(const Sequence& sequence, int32_t head_kv, int32_t key, int32_t count) const {
    for (int32_t member = 0; member < group; ++member) {
      if (!mask_hides<A>(p.mask, place_of(sequence, head_kv, member, key, count))) return false;
    }
    return true;
  }

  // pairs[r][i] = q[r] . k[i].
  void multiply(const HeadMatrix<T>& k, int32_t count, int32_t rows, A* pairs) const {
    if (rows > kRowsOfDots) {
      pack_lanes(over_columns(k, 0, count, buffer.data()), count, num_elements<E>(p.head_dim),
                 k_lanes.data());
      pair_products({q.data(), q_stride}, k_lanes.data(), whole_tile(rows, count), p.head_dim,
                    pairs);
      return;
    }
    for (int32_t r = 0; r < rows; ++r) {
      dots_of_keys(k, count, q_numbers.data() + r * padded<A>(p.head_dim), pairs + r * kRows);
    }
  }

  // result[r] += sum_i weights[r][i] * v[i].
  void weigh(const HeadMatrix<T>& v, int32_t count, int32_t rows, const A* weights, int64_t stride,
             A* result) const {
    if (rows > kRowsOfDots) {
      accumulate_rows(weights_over_lanes(weights, rows, elements.data()),
                      over_rows(v, 0, count, buffer.data()), whole_tile(rows, count), p.head_dim_v,
                      result);
      return;
    }
    for (int32_t r = 0; r < rows; ++r) {
      weigh_values(v, count, weights + r * kRows, result + r * stride);
    }
  }

  TilePlace<false> place_of(const Sequence& sequence, int32_t head_kv, int32_t member, int32_t key,
                            int32_t count) const {
    return {sequence, head_kv * group + member, key, count, 0, sequence.seqlen_q};
  }

  // f(place, scores) for each query head's part of a tile of keys.
  template <typename F>
  void for_heads(const Sequence& sequence, int32_t head_kv, int32_t key, int32_t count, A* tile,
                 const F& f) const {
    for (int32_t member = 0; member < group; ++member) {
      f(place_of(sequence, head_kv, member, key, count),
        tile + int64_t{member} * sequence.seqlen_q * kRows);
    }
  }

  const AttentionForwardParams& p;
  const int32_t group;
  const int64_t q_stride;
  const Scratch<E> q;
  const Scratch<A> q_numbers;  // in place of q, of few rows
  const Scratch<E> k_lanes, buffer, elements;
  const Scratch<A> scores;
  const Scratch<T> pages;
};

// Puts the chunks of a head's rows together, those of the tasks from the first on.
template <typename T, typename A = Accumulator<T>>
static void merge_chunks(const AttentionForwardParams& p, const Sequence& sequence, int32_t head,
                         const Partials<A>& partials, int64_t first_task) {
  alignas(64) A result[kMaxHeadDim];
  const int32_t group = group_size(p), chunks = num_chunks<A>(sequence);
  const auto out = query_rows(static_cast<T*>(p.out), p.out_strides, sequence, head);
  for (int32_t row = 0; row < sequence.seqlen_q; ++row) {
    const int32_t row_of_group = head % group * sequence.seqlen_q + row;
    A max = kHiddenScore<A>, sum = 0;
    for (int32_t c = 0; c < chunks; ++c) {
      const A of_chunk = partials.max(first_task + c, row_of_group);
      max = of_chunk > max ? of_chunk : max;
    }
    const A shift = max == kHiddenScore<A> ? A(0) : max;
    std::fill_n(result, partials.columns, A(0));
    for (int32_t c = 0; c < chunks; ++c) {
      const A* of_chunk = partials.result(first_task + c, row_of_group);
      const A factor = std::exp(partials.max(first_task + c, row_of_group) - shift);
      sum += factor * partials.sum(first_task + c, row_of_group);
#pragma omp simd
      for (int32_t d = 0; d < p.head_dim_v; ++d) result[d] += factor * of_chunk[d];
    }
    const RowEnd<A> row_end = end_row(p, head, max, sum);
    store_row_end(p, row_of_all(p, sequence, head, row), row_end);
    store_row(result, row_end.scale, p.head_dim_v, out + row * p.out_strides.row);
  }
}

// The longest of the sequences that are decoded, in queries and in chunks. Of unpacked ones their
// shape says it.
struct Longest {
  int32_t queries, chunks;
};
template <typename A>
static Longest longest_decoded(const AttentionProblem& p) {
  if (p.maybe_cu_seqlens_q == nullptr) {
    return {p.seqlen_q <= kQueriesOfDecode ? p.seqlen_q : 0,
            static_cast<int32_t>(num_tile_slots(p, false, kChunk<A>))};
  }
  Longest longest{};
  const auto sequences = static_cast<int32_t>(num_sequences_and_rest(p));
  for (int32_t index = 0; index < sequences; ++index) {
    const Sequence sequence = sequence_of(p, index);
    if (!is_decoded(sequence)) continue;
    longest.queries = std::max(longest.queries, sequence.seqlen_q);
    longest.chunks = std::max(longest.chunks, num_chunks<A>(sequence));
  }
  return longest;
}

// The rows of a sequence of one chunk are finished by its task; the others' chunks are put together
// by tasks of their own, when all are there.
template <typename T>
static void decode(const AttentionForwardParams& p) {
  using A = Accumulator<T>;
  const Longest longest = longest_decoded<A>(p);
  if (longest.queries == 0) return;
  const int32_t group = group_size(p), most_rows = group * longest.queries;
  const int64_t chunks = num_tile_slots(p, false, kChunk<A>);
  const int64_t tasks = int64_t{p.batch} * p.num_heads_kv * chunks;
  const int64_t kept = longest.chunks > 1 ? tasks : 0;
  const Partials<A> partials(p, most_rows, kept);
  parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const DecodePass<T> pass(p, most_rows);
    const Partials<A> own(p, most_rows, 1);
    for (int64_t task = begin; task < end; ++task) {
      const auto [sequence, head_kv, key] = task_place(p, false, kChunk<A>, task);
      if (!is_decoded(sequence) || key >= sequence.seqlen_k) continue;
      if (num_chunks<A>(sequence) > 1) {
        pass.run(sequence, head_kv, key, partials, task);
        continue;
      }
      pass.run(sequence, head_kv, key, own, 0);
      for (int32_t member = 0; member < group; ++member) {
        merge_chunks<T>(p, sequence, head_kv * group + member, own, 0);
      }
    }
  });
  const int64_t heads = num_sequences_and_rest(p) * p.num_heads;
  // A thread is worth waking for some ten thousand elements.
  const int64_t elements = kept * most_rows * partials.columns;
  const int64_t grain = 1 + 16384 * heads / (elements + 1);
  parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int32_t head = static_cast<int32_t>(task % p.num_heads);
      const Sequence sequence = sequence_of(p, static_cast<int32_t>(task / p.num_heads));
      if (!is_decoded(sequence) || num_chunks<A>(sequence) == 1) continue;
      merge_chunks<T>(p, sequence, head, partials,
                      (int64_t{sequence.batch} * p.num_heads_kv + head / group) * chunks +
                          first_key_slot(p, sequence, kChunk<A>));
    }
  });
}
