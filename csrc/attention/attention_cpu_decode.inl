// Attention forward on the CPU for sequences of a query or a few: bound by the reading of keys and
// values, which come from memory once, in whole vectors along a row. Part of attention_cpu.inl.
//
// A task is a chunk of keys of a head, of a size of its own, whatever the number of threads: one
// sequence fills the machine, and its result is the same in any batch. What the chunks give is then
// put together in their order.

constexpr int32_t kChunk = 256;

// A whole vector of a row, or `count` elements of one and zeros behind.
template <typename T, typename A = Accumulator<T>>
static inline typename VectorOf<A>::type load_vector(const T* from) {
  using Vector = typename VectorOf<A>::type;
  if constexpr (std::is_same_v<T, A>) {
    return *reinterpret_cast<const typename VectorOf<A>::unaligned_type*>(from);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Narrow
        __attribute__((vector_size(FUSED_VECTOR_BYTES / 2), may_alias, aligned(1)));
    typedef uint32_t Wide __attribute__((vector_size(FUSED_VECTOR_BYTES)));
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const Narrow*>(from), Wide) << 16);
  } else {
    alignas(64) A lanes[kLanes<A>];
#pragma omp simd
    for (int64_t i = 0; i < kLanes<A>; ++i) lanes[i] = load(from[i]);
    return *reinterpret_cast<const Vector*>(lanes);
  }
}
template <typename T, typename A = Accumulator<T>>
static inline typename VectorOf<A>::type load_vector(const T* from, int64_t count) {
  if (count >= kLanes<A>) return load_vector(from);
  typename VectorOf<A>::type lanes{};
  for (int64_t i = 0; i < count; ++i) lanes[i] = load(from[i]);
  return lanes;
}

// dots[j] = q . k[j] for the rows key .. key + count - 1 of k; q is padded with zeros. Whole
// vectors of dots are written.
template <typename T, typename A = Accumulator<T>>
static void dots_of_keys(const HeadMatrix<T>& k, int32_t key, int32_t count, const A* q, A* dots) {
  using Vector = typename VectorOf<A>::type;
  constexpr int32_t kCount = static_cast<int32_t>(kLanes<A>);
  for (int32_t j = 0; j < count; j += kCount) {
    Vector sums[kCount] = {};
    const T* first = k.row(key + j);
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

// kVectors vectors of result[d] = sum_j weights[j] * v[j][d], from column d on; of the last of them
// the columns that v has.
template <int32_t kVectors, typename T, typename A>
static void weigh_columns(const HeadMatrix<T>& v, int32_t key, int32_t count, const A* weights,
                          int32_t d, A* result) {
  using Vector = typename VectorOf<A>::type;
  const int64_t last = v.columns - d - (kVectors - 1) * kLanes<A>;
  Vector sums[kVectors] = {};
  for (int32_t j = 0; j < count; ++j) {
    const T* row = v.row(key + j) + d;
#pragma GCC unroll 4
    for (int32_t i = 0; i < kVectors - 1; ++i) {
      sums[i] += weights[j] * load_vector(row + i * kLanes<A>);
    }
    sums[kVectors - 1] += weights[j] * load_vector(row + (kVectors - 1) * kLanes<A>, last);
  }
#pragma GCC unroll 4
  for (int32_t i = 0; i < kVectors; ++i) {
    *reinterpret_cast<Vector*>(result + d + i * kLanes<A>) = sums[i];
  }
}

template <typename T, typename A = Accumulator<T>>
static void weigh_values(const HeadMatrix<T>& v, int32_t key, int32_t count, const A* weights,
                         A* result) {
  constexpr int32_t kVectors = 4, kStep = kVectors * static_cast<int32_t>(kLanes<A>);
  int32_t d = 0;
  for (; d + kStep - kLanes<A> < v.columns; d += kStep) {
    weigh_columns<kVectors>(v, key, count, weights, d, result);
  }
  for (; d < v.columns; d += kLanes<A>) weigh_columns<1>(v, key, count, weights, d, result);
}

// What a chunk of keys gives to a row: [padded(Dv)] of exp(score - max) * v, then max and the sum.
template <typename A>
static int64_t partial_size(const AttentionProblem& p) {
  return padded<A>(p.head_dim_v) + kLanes<A>;
}

template <typename T, typename A = Accumulator<T>>
static void decode_chunk(const AttentionForwardParams& p, const Sequence& sequence,
                         const Band& band, int32_t head, int32_t row, const Range& keys, A* q,
                         T* page_buffer, A* partial) {
  using Vector = typename VectorOf<A>::type;
  A* const max_and_sum = partial + padded<A>(p.head_dim_v);
  max_and_sum[0] = kHiddenScore<A>;
  max_and_sum[1] = 0;
  std::fill_n(partial, p.head_dim_v, A(0));
  const int32_t count = keys.end - keys.begin;
  if (count <= 0) return;
  const int32_t head_kv = head / (p.num_heads / p.num_heads_kv);
  const auto k = cache_rows(p, p.k, p.k_strides, sequence, head_kv, p.head_dim, keys.begin, count,
                            page_buffer);
  copy_row(query_matrix<T>(p.q, p.q_strides, sequence, head, p.head_dim).row(row), p.head_dim,
           padded<A>(p.head_dim), q);
  alignas(64) A weights[kChunk];
  dots_of_keys(k, 0, count, q, weights);
  if (p.softcap == 0 && p.maybe_alibi_slopes == nullptr && p.mask.kind == MaskKind::kNone) {
    for (int32_t j = 0; j < count; ++j) weights[j] *= static_cast<A>(p.scale);
  } else {
    for (int32_t j = 0; j < count; ++j) {
      weights[j] = final_score(p, sequence, band, head, row, keys.begin + j, weights[j]).value;
    }
  }
  std::fill(weights + count, weights + padded<A>(count), kHiddenScore<A>);
  A max = weights[0];
#pragma omp simd reduction(max : max)
  for (int32_t j = 0; j < count; ++j) max = weights[j] > max ? weights[j] : max;
  const A shift = max == kHiddenScore<A> ? A(0) : max;
  Vector sums{};
  for (int32_t j = 0; j < count; j += kLanes<A>) {
    Vector& of_keys = *reinterpret_cast<Vector*>(weights + j);
    of_keys = softmax_exp(of_keys - shift);
    sums += of_keys;
  }
  A sum = 0;
  for (int32_t i = 0; i < kLanes<A>; ++i) sum += sums[i];
  max_and_sum[0] = max;
  max_and_sum[1] = sum;
  for (int32_t j = 0; p.maybe_rng != nullptr && j < count; ++j) {
    weights[j] *= dropout_scale<A>(p, sequence, head, row, keys.begin + j);
  }
  const auto v = cache_rows(p, p.v, p.v_strides, sequence, head_kv, p.head_dim_v, keys.begin, count,
                            page_buffer);
  weigh_values(v, 0, count, weights, partial);
}

// Puts the chunks of a row together.
template <typename T, typename A = Accumulator<T>>
static void merge_chunks(const AttentionForwardParams& p, const Sequence& sequence, int32_t head,
                         int32_t row, const A* partials, int64_t stride, int32_t chunks,
                         A* result) {
  const int64_t columns = padded<A>(p.head_dim_v);
  A max = kHiddenScore<A>, sum = 0;
  for (int32_t c = 0; c < chunks; ++c) {
    const A of_chunk = partials[c * stride + columns];
    max = of_chunk > max ? of_chunk : max;
  }
  const A shift = max == kHiddenScore<A> ? A(0) : max;
  std::fill_n(result, columns, A(0));
  for (int32_t c = 0; c < chunks; ++c) {
    const A* partial = partials + c * stride;
    const A factor = std::exp(partial[columns] - shift);
    sum += factor * partial[columns + 1];
#pragma omp simd
    for (int32_t d = 0; d < p.head_dim_v; ++d) result[d] += factor * partial[d];
  }
  const RowEnd<A> row_end = end_row(p, head, max, sum);
  store_row_end(p, row_of_all(p, sequence, head, row), row_end);
  store_row(
      result, row_end.scale, p.head_dim_v,
      query_rows(static_cast<T*>(p.out), p.out_strides, sequence, head) + row * p.out_strides.row);
}

template <typename T>
static void decode(const AttentionForwardParams& p) {
  using A = Accumulator<T>;
  const int64_t heads = int64_t{p.batch} * p.num_heads;
  const int64_t chunks = num_tile_slots(p, false, kChunk);
  const int64_t size = partial_size<A>(p), chunk_size = kFewQueries * size;
  const Scratch<A> partials(heads * chunks * chunk_size);
  const int64_t page_buffer_size =
      p.maybe_block_table != nullptr ? int64_t{kChunk} * std::max(p.head_dim, p.head_dim_v) : 0;
  parallel_for(0, heads * chunks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) A q[kMaxHeadDim];
    const Scratch<T> page_buffer(page_buffer_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head_of_all = task / chunks;
      const int32_t head = static_cast<int32_t>(head_of_all % p.num_heads);
      const auto [sequence, key] =
          own_tile(p, false, static_cast<int32_t>(head_of_all / p.num_heads),
                   static_cast<int32_t>(task % chunks), kChunk);
      if (!has_few_queries(sequence) || key >= sequence.seqlen_k) continue;
      const Band band = visible_band(p, sequence);
      for (int32_t row = 0; row < sequence.seqlen_q; ++row) {
        const Range seen = keys_seen_by(sequence, band, row, row);
        const Range keys{std::max(seen.begin, key), std::min(seen.end, key + kChunk)};
        decode_chunk<T>(p, sequence, band, head, row, keys, q, page_buffer.data(),
                        partials.data() + task * chunk_size + row * size);
      }
    }
  });
  const int64_t sequences = p.num_sequences + (p.maybe_cu_seqlens_q != nullptr);
  // A thread is worth waking for some ten thousand elements.
  const int64_t grain = 1 + 16384 * sequences / ((chunks + 1) * p.batch * size);
  parallel_for(0, sequences * p.num_heads, grain, [&](int64_t begin, int64_t end) {
    alignas(64) A result[kMaxHeadDim];
    for (int64_t task = begin; task < end; ++task) {
      const int32_t head = static_cast<int32_t>(task % p.num_heads);
      const Sequence sequence = sequence_of(p, static_cast<int32_t>(task / p.num_heads));
      if (!has_few_queries(sequence)) continue;
      const int64_t first = (int64_t{sequence.batch} * p.num_heads + head) * chunks +
                            first_key_slot(p, sequence, kChunk);
      for (int32_t row = 0; row < sequence.seqlen_q; ++row) {
        merge_chunks<T>(p, sequence, head, row, partials.data() + first * chunk_size + row * size,
                        chunk_size, (sequence.seqlen_k + kChunk - 1) / kChunk, result);
      }
    }
  });
}
