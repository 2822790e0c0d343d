// Norms and clipping on the CPU, included once per instruction set.

template <typename T>
static double sum_of_squares(const T* x, int64_t numel) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < numel; ++i) {
    const double value = load(x[i]);
    sum += value * value;
  }
  return sum;
}

template <typename T>
static void multiply(T* x, int64_t numel, Accumulator<T> factor) {
  for (int64_t i = 0; i < numel; ++i) x[i] = store<T>(load(x[i]) * factor);
}
