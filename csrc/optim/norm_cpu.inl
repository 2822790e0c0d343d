// Norms and clipping on the CPU, included once per instruction set: in blocks, each asked for some
// blocks ahead.

template <typename T>
constexpr int64_t kNormBlock = 1024 / sizeof(T);

// Of `numel` elements from x on, asks for the block that comes some blocks after the first.
template <typename T>
static inline void prefetch_later_block(const T* x, int64_t numel) {
  constexpr int64_t kAhead = 8 * kNormBlock<T>;
  if (kAhead < numel) prefetch(x + kAhead, kNormBlock<T> * sizeof(T));
}

// Of the first `numel` elements of a run of `run_numel`, whose others come next.
template <typename T>
static double sum_of_squares(const T* x, int64_t numel, int64_t run_numel) {
  double sum = 0;
  for (int64_t begin = 0; begin < numel; begin += kNormBlock<T>) {
    prefetch_later_block(x + begin, run_numel - begin);
    const int64_t end = std::min(begin + kNormBlock<T>, numel);
    double block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t i = begin; i < end; ++i) {
      const double value = load(x[i]);
      block_sum += value * value;
    }
    sum += block_sum;
  }
  return sum;
}

template <typename T>
static void multiply(T* x, int64_t numel, Accumulator<T> factor) {
  for (int64_t begin = 0; begin < numel; begin += kNormBlock<T>) {
    prefetch_later_block(x + begin, numel - begin);
    const int64_t end = std::min(begin + kNormBlock<T>, numel);
    for (int64_t i = begin; i < end; ++i) x[i] = store<T>(load(x[i]) * factor);
  }
}
