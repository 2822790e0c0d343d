// Matrices turned over in registers, between any two storage types. Included by the kernels of an
// instruction set that need it.

// What an element is while it is turned over: a number as wide as its sums, or, if it is several
// steps of a product, itself.
template <typename T, int kEach = kSteps<T>>
struct TurnedAs {
  using type = T;
};
template <typename T>
struct TurnedAs<T, 1> {
  using type = Accumulator<T>;
};

template <typename To, typename From>
static inline To converted(From from) {
  if constexpr (std::is_same_v<To, From>) {
    return from;
  } else {
    return store<To>(load(from));
  }
}

// The lower or the upper halves of a and b, element by element in turn.
template <typename A, bool kUpper, size_t... I>
static inline typename VectorOf<A>::type interleave(typename VectorOf<A>::type a,
                                                    typename VectorOf<A>::type b,
                                                    std::index_sequence<I...>) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int64_t kFirst = kUpper ? kLanes<A> / 2 : 0;
  return __builtin_shuffle(a, b,
                           typename VectorOf<Index>::type{kFirst + I / 2 + I % 2 * kLanes<A>...});
}

// to[i * ld_to + r] = from[r * ld_from + i] for a block of lanes by lanes, of which the first
// `columns` i are stored: perfect shuffles, as many as halvings make a vector one element. A call
// of its own: inlined, g++ 12 takes the vectors apart where their elements come from or go to.
template <typename A>
__attribute__((noinline)) static void transpose_block(A* to, int64_t ld_to, const A* from,
                                                      int64_t ld_from, int64_t columns) {
  using Vector = typename VectorOf<A>::type;
  using Unaligned = typename VectorOf<A>::unaligned_type;
  constexpr int64_t kSize = kLanes<A>;
  constexpr auto kIndices = std::make_index_sequence<kSize>{};
  Vector rows[kSize], next[kSize];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kSize; ++r) {
    rows[r] = *reinterpret_cast<const Unaligned*>(from + r * ld_from);
  }
#pragma GCC unroll 4
  for (int64_t half = kSize; half > 1; half /= 2) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < kSize / 2; ++r) {
      next[2 * r] = interleave<A, false>(rows[r], rows[r + kSize / 2], kIndices);
      next[2 * r + 1] = interleave<A, true>(rows[r], rows[r + kSize / 2], kIndices);
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kSize; ++r) rows[r] = next[r];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSize; ++i) {
    if (i < columns) *reinterpret_cast<Unaligned*>(to + i * ld_to) = rows[i];
  }
}

// The same between storage types.
template <typename To, typename From>
static inline void transpose_block(To* to, int64_t ld_to, const From* from, int64_t ld_from,
                                   int64_t columns) {
  using A = Accumulator<To>;
  constexpr int64_t kSize = kLanes<A>;
  alignas(64) A rows[kSize * kSize], turned[kSize * kSize];
  for (int64_t r = 0; r < kSize; ++r) {
    for (int64_t i = 0; i < kSize; ++i) rows[r * kSize + i] = load(from[r * ld_from + i]);
  }
  transpose_block<A>(turned, kSize, rows, kSize, columns);
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t r = 0; r < kSize; ++r) to[i * ld_to + r] = store<To>(turned[i * kSize + r]);
  }
}

// The same for a block of any size: four rows at a time, so that what it writes comes in runs.
template <typename To, typename From>
static inline void transpose_rest(To* to, int64_t ld_to, const From* from, int64_t ld_from,
                                  int64_t rows, int64_t columns) {
  for (; rows >= 4; rows -= 4, from += 4 * ld_from, to += 4) {
    for (int64_t i = 0; i < columns; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) to[i * ld_to + j] = converted<To>(from[j * ld_from + i]);
    }
  }
  for (; rows > 0; --rows, from += ld_from, ++to) {
    for (int64_t i = 0; i < columns; ++i) to[i * ld_to] = converted<To>(from[i]);
  }
}

// to[i * ld_to + r] = from[r * ld_from + i] for r < rows, i < columns. Elements before `readable`
// may be read, whether they are part of the block or not.
template <typename To, typename From>
static inline void transpose(To* to, int64_t ld_to, const From* from, int64_t ld_from, int64_t rows,
                             int64_t columns, const From* readable) {
  constexpr int64_t kSize = kLanes<typename TurnedAs<To>::type>;
  int64_t r = 0;
  for (; r + kSize <= rows; r += kSize, from += kSize * ld_from) {
    for (int64_t i = 0; i < columns; i += kSize) {
      const int64_t left = std::min(kSize, columns - i);
      const bool whole = left == kSize || readable - from >= (kSize - 1) * ld_from + i + kSize;
      if (whole) {
        transpose_block(to + i * ld_to + r, ld_to, from + i, ld_from, left);
      } else {
        transpose_rest(to + i * ld_to + r, ld_to, from + i, ld_from, kSize, left);
      }
    }
  }
  transpose_rest(to + r, ld_to, from, ld_from, rows - r, columns);
}
