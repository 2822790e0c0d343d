// Norms and clipping on the CPU, included once per instruction set: in blocks, each asked for some
// blocks ahead. What is asked for behind the end mostly is the next chunk.

template <typename T>
constexpr int64_t kNormBlock = 1024 / sizeof(T);

template <typename T>
static inline void prefetch_later_block(const T* block) {
  constexpr int64_t kAhead = 8;
  prefetch(block + kAhead * kNormBlock<T>, kNormBlock<T> * sizeof(T));
}

template <typename T>
static double sum_of_squares(const T* x, int64_t numel) {
  double sum = 0;
  for (int64_t begin = 0; begin < numel; begin += kNormBlock<T>) {
    prefetch_later_block(x + begin);
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
    prefetch_later_block(x + begin);
    const int64_t end = std::min(begin + kNormBlock<T>, numel);
    for (int64_t i = begin; i < end; ++i) x[i] = store<T>(load(x[i]) * factor);
  }
}
