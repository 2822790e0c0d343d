// Optimizer steps on the CPU, included once per instruction set: one pass over memory, in blocks
// that stay in the first-level cache, each a few simple loops that g++ vectorises.
//
// What is stored in the type of the maths is worked on where it lies; anything else is converted
// into a buffer of the block and back. ivdep, not __restrict: an element's operands may be one and
// the same (a parameter that is its own gradient), but no element depends on another.

constexpr int kBlock = kQuantBlock;

// The block's `n` values of X as A: in place where the types are the same, else in `buffer`.
template <typename A, typename X>
static inline A* stage(X* data, A* buffer, int n) {
  if constexpr (std::is_same_v<A, X>) {
    return data;
  } else {
#pragma GCC ivdep
    for (int j = 0; j < n; ++j) buffer[j] = static_cast<A>(load(data[j]));
    return buffer;
  }
}

template <typename X, typename A>
static inline void unstage(const A* values, X* data, int n) {
  if constexpr (!std::is_same_v<A, X>) {
#pragma GCC ivdep
    for (int j = 0; j < n; ++j) data[j] = store<X>(static_cast<Accumulator<X>>(values[j]));
  }
}

template <bool kUnsigned, typename A>
static void dequantize_block(const uint8_t* codes, float scale, A* values, int n) {
#pragma GCC ivdep
  for (int j = 0; j < n; ++j) values[j] = dequantize<kUnsigned>(codes[j], scale);
}

template <bool kUnsigned, typename A>
static void quantize_block(const A* values, uint8_t* codes, float& scale, int n) {
  // As bits, where NaN is the largest.
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int j = 0; j < n; ++j) {
    const uint32_t bits = detail::bit_cast<uint32_t>(static_cast<float>(values[j])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const float block_scale = detail::bit_cast<float>(largest);
  scale = block_scale;
#pragma GCC ivdep
  for (int j = 0; j < n; ++j) {
    codes[j] = quantize<kUnsigned>(static_cast<float>(values[j]), block_scale);
  }
}

// State k of a block of elements from `begin` on.
template <bool kUnsigned, typename S, typename A>
static A* stage_state(const OptimTensor& t, int k, int64_t begin, A* buffer, int n) {
  S* data = static_cast<S*>(t.states[k]) + begin;
  if constexpr (std::is_same_v<S, uint8_t>) {
    dequantize_block<kUnsigned>(data, t.state_scales[k][begin / kBlock], buffer, n);
    return buffer;
  } else {
    return stage<A>(data, buffer, n);
  }
}

template <bool kUnsigned, typename S, typename A>
static void unstage_state(const OptimTensor& t, int k, int64_t begin, const A* values, int n) {
  S* data = static_cast<S*>(t.states[k]) + begin;
  if constexpr (std::is_same_v<S, uint8_t>) {
    quantize_block<kUnsigned>(values, data, t.state_scales[k][begin / kBlock], n);
  } else {
    unstage(values, data, n);
  }
}

template <typename T, typename A>
static A* stage_param(const OptimCommon& c, const OptimTensor& t, int64_t begin, A* buffer, int n) {
  T* param = static_cast<T*>(t.param) + begin;
  if constexpr (sizeof(T) == 2) {
    if (c.master == MasterType::kFloat32) return static_cast<float*>(t.maybe_master) + begin;
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (c.master == MasterType::kRemainder) {
      const int16_t* remainder = static_cast<const int16_t*>(t.maybe_master) + begin;
#pragma GCC ivdep
      for (int j = 0; j < n; ++j) buffer[j] = join_remainder(param[j], remainder[j]);
      return buffer;
    }
  }
  return stage<A>(param, buffer, n);
}

template <typename T>
static void round_block(const OptimCommon& c, const OptimTensor& t, int64_t begin, const float* w,
                        T* param, int n) {
  for (int group = 0; group < n; group += kRandomGroup) {
    const Philox4 bits = random_bits(c.maybe_rng, t.index, (begin + group) / kRandomGroup);
    const int count = n - group < kRandomGroup ? n - group : kRandomGroup;
    for (int j = 0; j < count; ++j) {
      param[group + j] = round_stochastically<T>(w[group + j], random_of_element(bits, j));
    }
  }
}

template <typename T, typename A>
static void unstage_param(const OptimCommon& c, const OptimTensor& t, int64_t begin, const A* w,
                          int n) {
  T* param = static_cast<T*>(t.param) + begin;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (c.master == MasterType::kRemainder) {
      int16_t* remainder = static_cast<int16_t*>(t.maybe_master) + begin;
#pragma GCC ivdep
      for (int j = 0; j < n; ++j) param[j] = split_remainder(w[j], remainder[j]);
      return;
    }
  }
  if constexpr (sizeof(T) == 2) {
    if (c.maybe_rng != nullptr) return round_block(c, t, begin, w, param, n);
  }
  unstage(w, param, n);
}

// The moving average follows the parameter as it is kept: the master where there is one.
template <typename T, typename A>
static void average_block(const OptimCommon& c, const OptimTensor& t, int64_t begin, const A* w,
                          int n) {
  A* ema = static_cast<A*>(t.maybe_ema) + begin;
  const T* param = static_cast<const T*>(t.param) + begin;
  const A decay = static_cast<A>(c.ema_decay), rest = static_cast<A>(1.0 - c.ema_decay);
  if (c.master != MasterType::kNone) {
#pragma GCC ivdep
    for (int j = 0; j < n; ++j) ema[j] = decay * ema[j] + rest * w[j];
  } else {
#pragma GCC ivdep
    for (int j = 0; j < n; ++j) ema[j] = decay * ema[j] + rest * load(param[j]);
  }
}

template <typename Rule, bool kAll, typename A>
static void update_block(const typename Rule::template Scales<A>& given, const A* grad, A* param,
                         A* state0, A* state1, A* state2, int n) {
  constexpr int kStates = Rule::kNumStates - (kAll ? 0 : 1);
  const auto scales = given;
#pragma GCC ivdep
  for (int j = 0; j < n; ++j) {
    A p = param[j];
    A s0 = kStates > 0 ? state0[j] : A(0), s1 = kStates > 1 ? state1[j] : A(0),
      s2 = kStates > 2 ? state2[j] : A(0);
    Rule::template element<kAll>(scales, grad[j], p, s0, s1, s2);
    param[j] = p;
    if (kStates > 0) state0[j] = s0;
    if (kStates > 1) state1[j] = s1;
    if (kStates > 2) state2[j] = s2;
  }
}

// Divides a block of gradients by GradScaler's scale, and stores them so.
template <typename T, typename A>
static void unscale_block(const OptimCommon& c, T* grad, A* g, int n) {
  const A scale = static_cast<A>(*c.maybe_grad_scale);
#pragma GCC ivdep
  for (int j = 0; j < n; ++j) g[j] = g[j] / scale;
  unstage(g, grad, n);
}

// Asks for the block of all operands from `begin` on, in turns: a cache line of the widest, and as
// many elements of the others.
template <typename T, typename S, int kStates>
static void prefetch_block(const OptimCommon& c, const OptimTensor& t, int64_t begin) {
  const auto ask = [](const void* data, int64_t i, size_t element_size) {
    prefetch(static_cast<const char*>(data) + i * element_size);
  };
  constexpr int64_t kLine = kCacheLine / sizeof(Accumulator<T>);
  for (int64_t i = begin; i < begin + kBlock; i += kLine) {
    ask(t.grad, i, sizeof(T));
    ask(t.param, i, sizeof(T));
    for (int k = 0; k < kStates; ++k) ask(t.states[k], i, sizeof(S));
    if (c.master == MasterType::kFloat32) ask(t.maybe_master, i, sizeof(float));
    if (c.master == MasterType::kRemainder) ask(t.maybe_master, i, sizeof(int16_t));
    if (t.maybe_ema != nullptr) ask(t.maybe_ema, i, sizeof(Accumulator<T>));
  }
}

// Elements [begin, end) of a tensor; `begin` is a multiple of a block.
template <typename Rule, typename T, typename S, bool kAll>
static void update_blocks(const OptimCommon& c, const OptimTensor& t,
                          const typename Rule::template Scales<Accumulator<T>>& scales,
                          int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int kStates = Rule::kNumStates - (kAll ? 0 : 1);
  alignas(64) A param_buffer[kBlock], grad_buffer[kBlock], buffers[kMaxStates][kBlock];
  for (; begin < end; begin += kBlock) {
    const int n = static_cast<int>(end - begin < kBlock ? end - begin : kBlock);
    if (begin + kBlock < end) prefetch_block<T, S, kStates>(c, t, begin + kBlock);
    T* grad = static_cast<T*>(t.grad) + begin;
    A* param = stage_param<T, A>(c, t, begin, param_buffer, n);
    A* g = stage<A>(grad, grad_buffer, n);
    A *s0 = nullptr, *s1 = nullptr, *s2 = nullptr;
    if constexpr (kStates > 0) {
      s0 = stage_state<Rule::template kUnsigned<0>, S>(t, 0, begin, buffers[0], n);
    }
    if constexpr (kStates > 1) {
      s1 = stage_state<Rule::template kUnsigned<1>, S>(t, 1, begin, buffers[1], n);
    }
    if constexpr (kStates > 2) {
      s2 = stage_state<Rule::template kUnsigned<2>, S>(t, 2, begin, buffers[2], n);
    }
    if (c.maybe_grad_scale != nullptr) unscale_block(c, grad, g, n);
    update_block<Rule, kAll>(scales, g, param, s0, s1, s2, n);
    unstage_param<T>(c, t, begin, param, n);
    if constexpr (kStates > 0) unstage_state<Rule::template kUnsigned<0>, S>(t, 0, begin, s0, n);
    if constexpr (kStates > 1) unstage_state<Rule::template kUnsigned<1>, S>(t, 1, begin, s1, n);
    if constexpr (kStates > 2) unstage_state<Rule::template kUnsigned<2>, S>(t, 2, begin, s2, n);
    if (t.maybe_ema != nullptr) average_block<T>(c, t, begin, param, n);
    if (c.zero_grad) memset(grad, 0, n * sizeof(T));
  }
}

// The same, with the options of the rule as a compile-time constant of its loop.
template <typename Types>
static void update_range(const typename Types::Rule::Params& p, const OptimTensor& t,
                         const typename Types::Scales& scales, int64_t begin, int64_t end) {
  using Rule = typename Types::Rule;
  using T = typename Types::Param;
  using S = typename Types::State;
  Rule::has_all(p) ? update_blocks<Rule, T, S, true>(p.common, t, scales, begin, end)
                   : update_blocks<Rule, T, S, false>(p.common, t, scales, begin, end);
}
