// Matrices turned over in registers. Part of attention_cpu.inl.

// Integers as wide as an element, to shuffle its vectors with.
template <typename E>
struct ShuffleOf {
  typedef std::conditional_t<sizeof(E) == 8, int64_t, int32_t> type
      __attribute__((vector_size(FUSED_VECTOR_BYTES)));
};

// One of log2(lanes) stages: swaps the off-diagonal blocks of kWidth by kWidth.
template <typename E, int kWidth>
static inline void transpose_stage(typename VectorOf<E>::type* rows) {
  constexpr int kCount = static_cast<int>(kLanes<E>);
  typename ShuffleOf<E>::type low{}, high{};
#pragma GCC unroll 16
  for (int c = 0; c < kCount; ++c) {
    low[c] = c & kWidth ? kCount + c - kWidth : c;
    high[c] = c & kWidth ? kCount + c : c + kWidth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) {
    if (r & kWidth) continue;
    const typename VectorOf<E>::type a = rows[r], b = rows[r + kWidth];
    rows[r] = __builtin_shuffle(a, b, low);
    rows[r + kWidth] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * kWidth < kCount) transpose_stage<E, 2 * kWidth>(rows);
}

// Turns a matrix over in whole vectors: `load(row, column)` gives the elements from a column on,
// and `store(column, row, vector)` takes those of a column from a row on. Rows behind the last are
// taken for zeros and not loaded; columns behind the last are loaded, and not stored.
template <typename E, typename Load, typename Store>
static inline void transpose(int64_t rows, int64_t columns, const Load& load, const Store& store) {
  using Vector = typename VectorOf<E>::type;
  constexpr int64_t kCount = kLanes<E>;
  for (int64_t row = 0; row < rows; row += kCount) {
    const int64_t loaded = std::min(kCount, rows - row);
    for (int64_t column = 0; column < columns; column += kCount) {
      Vector block[kCount];
      if (loaded == kCount) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kCount; ++r) block[r] = load(row + r, column);
      } else {
        for (int64_t r = 0; r < kCount; ++r) {
          block[r] = r < loaded ? Vector(load(row + r, column)) : Vector{};
        }
      }
      transpose_stage<E, 1>(block);
      const int64_t stored = std::min(kCount, columns - column);
      if (stored == kCount) {
#pragma GCC unroll 16
        for (int64_t c = 0; c < kCount; ++c) store(column + c, row, block[c]);
      } else {
        for (int64_t c = 0; c < stored; ++c) store(column + c, row, block[c]);
      }
    }
  }
}

// to[c * to_stride + r] = from[r * from_stride + c].
template <typename E>
static void transpose(const E* from, int64_t from_stride, int64_t rows, int64_t columns, E* to,
                      int64_t to_stride) {
  using Vector = typename VectorOf<E>::type;
  using Unaligned = typename VectorOf<E>::unaligned_type;
  transpose<E>(
      rows, columns,
      [&](int64_t r, int64_t c) -> Vector {
        return *reinterpret_cast<const Unaligned*>(from + r * from_stride + c);
      },
      [&](int64_t c, int64_t r, const Vector& vector) {
        *reinterpret_cast<Unaligned*>(to + c * to_stride + r) = vector;
      });
}
