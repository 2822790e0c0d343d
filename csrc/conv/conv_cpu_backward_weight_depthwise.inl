// Gradients of a depthwise convolution's weight and bias (one input channel in a group).
//
// Channels-last tensors: vectors run along channels, each row of pixels adds to one sum per tap.
// Others: each output channel is a dot product per row and tap. An item of work is a block of
// channels and a share of the rows, cut by shape alone and summed in order.

struct DepthwiseShares {
  int64_t blocks, shares, rows;
  DepthwiseShares(int64_t blocks, int64_t rows)
      : blocks(blocks),
        shares(std::max<int64_t>(1, std::min(16 / std::max<int64_t>(1, blocks), rows / 8))),
        rows(rows) {}
};

// Where row `index` of the output lies.
struct OutputRow {
  int64_t n, z, y;
  OutputRow(const Correlation& c, int64_t index)
      : n(index / c.count[1] / c.count[0]),
        z(index / c.count[1] % c.count[0]),
        y(index % c.count[1]) {}
};

// sums[tap][lane] for kLanes channels from `first`; the row after the last tap is the bias.
template <typename T>
static void depthwise_row_by_channel(const ConvBackwardWeightParams& p, const Correlation& c,
                                     const OutputRow& row, int64_t first, int64_t channels,
                                     typename VectorOf<Accumulator<T>>::type* sums) {
  using Vector = typename VectorOf<Accumulator<T>>::type;
  const T* grad = static_cast<const T*>(p.grad_output) + row.n * c.dest_stride.outer +
                  row.z * c.dest_stride.space[0] + row.y * c.dest_stride.space[1] + first;
  const T* image = static_cast<const T*>(c.source) + row.n * c.source_stride.outer + first;
  const int64_t step = c.dest_stride.space[2];
  for (int64_t w = 0; w < c.taps[0]; ++w) {
    for (int64_t v = 0; v < c.taps[1]; ++v) {
      const int64_t z = c.start[0] + c.step[0] * row.z + c.tap_step[0] * w;
      const int64_t y = c.start[1] + c.step[1] * row.y + c.tap_step[1] * v;
      if (z < 0 || z >= c.source_size[0] || y < 0 || y >= c.source_size[1]) continue;
      const T* line = image + z * c.source_stride.space[0] + y * c.source_stride.space[1];
      for (int64_t u = 0; u < c.taps[2]; ++u) {
        // Destinations whose tap lies inside the row.
        const int64_t at = c.start[2] + c.tap_step[2] * u;
        const int64_t begin = at >= 0 ? 0 : ceil_div(-at, c.step[2]);
        const int64_t inside = c.source_size[2] - at;
        const int64_t end =
            inside <= 0 ? 0 : std::min<int64_t>(c.count[2], ceil_div(inside, c.step[2]));
        Vector sum{};
        for (int64_t x = begin; x < end; ++x) {
          sum += load_vector(grad + x * step, channels) *
                 load_vector(line + (at + c.step[2] * x) * c.source_stride.space[2], channels);
        }
        sums[(w * c.taps[1] + v) * c.taps[2] + u] += sum;
      }
    }
  }
  Vector sum{};
  for (int64_t x = 0; x < c.count[2]; ++x) sum += load_vector(grad + x * step, channels);
  sums[num_taps(c)] += sum;
}

template <typename A>
static inline A dot(const A* a, const A* b, int64_t stride_b, int64_t count) {
  A sum = 0;
  if (stride_b == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  } else {
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i * stride_b];
  }
  return sum;
}

// sums[tap] of output channel k; `grad` and `line` hold one row each.
template <typename T>
static void depthwise_row_by_pixel(const ConvBackwardWeightParams& p, const Correlation& c,
                                   const OutputRow& row, int64_t k, Accumulator<T>* grad,
                                   Accumulator<T>* line, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  pack_row(grad, c.count[2],
           static_cast<const T*>(p.grad_output) + row.n * c.dest_stride.outer +
               k * c.dest_stride.channel + row.z * c.dest_stride.space[0] +
               row.y * c.dest_stride.space[1],
           c.dest_stride.space[2], 0, 1, int64_t{c.count[2]});
  const T* image = static_cast<const T*>(c.source) + row.n * c.source_stride.outer +
                   k / c.rows * c.source_stride.channel;
  const int64_t length =
      int64_t{c.step[2]} * (c.count[2] - 1) + int64_t{c.tap_step[2]} * (c.taps[2] - 1) + 1;
  for (int64_t w = 0; w < c.taps[0]; ++w) {
    for (int64_t v = 0; v < c.taps[1]; ++v) {
      const int64_t z = c.start[0] + c.step[0] * row.z + c.tap_step[0] * w;
      const int64_t y = c.start[1] + c.step[1] * row.y + c.tap_step[1] * v;
      if (z < 0 || z >= c.source_size[0] || y < 0 || y >= c.source_size[1]) continue;
      pack_row(line, length, image + z * c.source_stride.space[0] + y * c.source_stride.space[1],
               c.source_stride.space[2], c.start[2], 1, int64_t{c.source_size[2]});
      for (int64_t u = 0; u < c.taps[2]; ++u) {
        sums[(w * c.taps[1] + v) * c.taps[2] + u] +=
            dot<A>(grad, line + c.tap_step[2] * u, c.step[2], c.count[2]);
      }
    }
  }
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < c.count[2]; ++i) sum += grad[i];
  sums[num_taps(c)] += sum;
}

// Element (tap, k) of the sum over shares goes to its place; tap num_taps is the bias.
template <typename T, typename Total>
static void store_depthwise(const ConvBackwardWeightParams& p, const Correlation& c, int64_t k,
                            const Total& total) {
  int64_t tap = 0;
  for (int64_t w = 0; w < c.taps[0]; ++w) {
    for (int64_t v = 0; v < c.taps[1]; ++v) {
      for (int64_t u = 0; u < c.taps[2]; ++u, ++tap) {
        if (p.maybe_grad_weight == nullptr) continue;
        static_cast<T*>(p.maybe_grad_weight)[k * p.grad_weight_stride.outer +
                                             w * p.grad_weight_stride.space[0] +
                                             v * p.grad_weight_stride.space[1] +
                                             u * p.grad_weight_stride.space[2]] =
            store<T>(total(tap));
      }
    }
  }
  if (p.maybe_grad_bias != nullptr) static_cast<T*>(p.maybe_grad_bias)[k] = store<T>(total(tap));
}

template <typename T>
static void backward_weight_depthwise(const ConvBackwardWeightParams& p, const Correlation& c) {
  using A = Accumulator<T>;
  using Vector = typename VectorOf<A>::type;
  const bool by_channel =
      c.rows == 1 && c.groups > 1 && c.source_stride.channel == 1 && c.dest_stride.channel == 1;
  const int64_t channels = int64_t{c.groups} * c.rows, width = by_channel ? kLanes<A> : 1;
  const DepthwiseShares work(ceil_div(channels, width), int64_t{c.batch} * c.count[0] * c.count[1]);
  const int64_t taps = num_taps(c), item_size = (taps + 1) * width;
  const Scratch<A> partials(work.blocks * work.shares * item_size);
  parallel_for(0, work.blocks * work.shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t length = int64_t{c.step[2]} * c.count[2] + int64_t{c.tap_step[2]} * c.taps[2] + 1;
    const Scratch<A> grad(c.count[2] + 1), line(length);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / work.shares, share = item % work.shares;
      A* sums = partials.data() + item * item_size;
      std::fill(sums, sums + item_size, A(0));
      for (int64_t i = work.rows * share / work.shares; i < work.rows * (share + 1) / work.shares;
           ++i) {
        const OutputRow row(c, i);
        if (by_channel) {
          depthwise_row_by_channel<T>(p, c, row, block * width, channels - block * width,
                                      reinterpret_cast<Vector*>(sums));
        } else {
          depthwise_row_by_pixel<T>(p, c, row, block, grad.data(), line.data(), sums);
        }
      }
    }
  });
  for (int64_t k = 0; k < channels; ++k) {
    const A* first = partials.data() + k / width * work.shares * item_size + k % width;
    store_depthwise<T>(p, c, k, [&](int64_t tap) {
      A sum = 0;
      for (int64_t s = 0; s < work.shares; ++s) sum += first[s * item_size + tap * width];
      return sum;
    });
  }
}
