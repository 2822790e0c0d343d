// Gradients of a depthwise convolution's weight and bias (one input channel in a group).
//
// Channels-last tensors: vectors run along channels, each row of pixels adds to one sum per tap,
// and an item of work is a share of the rows, all channels of a row while it is in the cache.
// Others: each output channel is a dot product per tap, lane by lane, and an item is a channel and
// a share of the rows. Shares are cut by shape alone and summed in order.

struct DepthwiseShares {
  int64_t channels, shares, rows;  // channels that are items of their own
  DepthwiseShares(int64_t channels, int64_t rows)
      : channels(channels),
        shares(std::max<int64_t>(1, std::min(16 / std::max<int64_t>(1, channels), rows / 8))),
        rows(rows) {}
  int64_t begin(int64_t share) const { return rows * share / shares; }
};

// Where row `index` of the output lies.
struct OutputRow {
  int64_t n, z, y;
  OutputRow(const Correlation& c, int64_t index)
      : n(index / c.count[1] / c.count[0]),
        z(index / c.count[1] % c.count[0]),
        y(index % c.count[1]) {}
};

// sums[u] += grad times the source under tap u, over the pixels of a row for which all of kTaps
// taps lie inside: as many chains of additions in flight.
template <bool kWhole, int kTaps, typename T>
static inline void depthwise_taps(const T* grad, int64_t grad_step, const T* source,
                                  int64_t source_step, int64_t tap_step, int64_t count,
                                  int64_t channels, typename VectorOf<Accumulator<T>>::type* sums) {
  typename VectorOf<Accumulator<T>>::type sum[kTaps] = {};
  for (int64_t x = 0; x < count; ++x) {
    const auto element = load_channels<kWhole>(grad + x * grad_step, channels);
#pragma GCC unroll 4
    for (int u = 0; u < kTaps; ++u) {
      const T* from = source + x * source_step + u * tap_step;
      sum[u] += element * load_channels<kWhole>(from, channels);
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kTaps; ++u) sums[u] += sum[u];
}

// sums[tap][lane] for kLanes channels from `first`; the row after the last tap is the bias.
template <bool kWhole, typename T>
static void depthwise_row_by_channel(const ConvBackwardWeightParams& p, const Correlation& c,
                                     const std::vector<AxisRun>& x_runs, const OutputRow& row,
                                     int64_t first, int64_t channels,
                                     typename VectorOf<Accumulator<T>>::type* sums) {
  const T* grad = static_cast<const T*>(p.grad_output) + row.n * c.dest_stride.outer +
                  row.z * c.dest_stride.space[0] + row.y * c.dest_stride.space[1] + first;
  const T* image = static_cast<const T*>(c.source) + row.n * c.source_stride.outer + first;
  const int64_t grad_step = c.dest_stride.space[2], pixel = c.source_stride.space[2];
  for (int64_t w = 0; w < c.taps[0]; ++w) {
    for (int64_t v = 0; v < c.taps[1]; ++v) {
      const int64_t z = c.start[0] + c.step[0] * row.z + c.tap_step[0] * w;
      const int64_t y = c.start[1] + c.step[1] * row.y + c.tap_step[1] * v;
      if (z < 0 || z >= c.source_size[0] || y < 0 || y >= c.source_size[1]) continue;
      const T* line = image + z * c.source_stride.space[0] + y * c.source_stride.space[1];
      for (const AxisRun& x : x_runs) {
        const int64_t begin = x.positions.begin;
        const auto taps = [&](auto number, int64_t u) {
          depthwise_taps<kWhole, decltype(number)::value>(
              grad + begin * grad_step, grad_step,
              line + (c.start[2] + c.step[2] * begin + c.tap_step[2] * u) * pixel,
              c.step[2] * pixel, c.tap_step[2] * pixel, x.positions.end - begin, channels,
              sums + (w * c.taps[1] + v) * c.taps[2] + u);
        };
        int64_t u = x.taps.begin;
        for (; x.taps.end - u >= 4; u += 4) taps(std::integral_constant<int, 4>{}, u);
        if (x.taps.end - u == 3) taps(std::integral_constant<int, 3>{}, u);
        if (x.taps.end - u == 2) taps(std::integral_constant<int, 2>{}, u);
        if (x.taps.end - u == 1) taps(std::integral_constant<int, 1>{}, u);
      }
    }
  }
  typename VectorOf<Accumulator<T>>::type sum{};
  for (int64_t x = 0; x < c.count[2]; ++x)
    sum += load_channels<kWhole>(grad + x * grad_step, channels);
  sums[num_taps(c)] += sum;
}

// sums[u] += grad times the row under tap u, lane by lane, over `count` pixels; what grad and line
// hold behind them counts for nothing.
template <typename A, int kTaps>
static inline void row_taps(const A* grad, const A* line, int64_t tap_step, int64_t count,
                            typename VectorOf<A>::type* sums) {
  using Vector = typename VectorOf<A>::type;
  using Unaligned = typename VectorOf<A>::unaligned_type;
  Vector sum[kTaps] = {};
  int64_t x = 0;
  for (; count - x >= kLanes<A>; x += kLanes<A>) {
#pragma GCC unroll 4
    for (int u = 0; u < kTaps; ++u) {
      sum[u] += *reinterpret_cast<const Vector*>(grad + x) *
                *reinterpret_cast<const Unaligned*>(line + u * tap_step + x);
    }
  }
  if (x < count) {
    using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
    typename VectorOf<Index>::type lane;
    for (int64_t i = 0; i < kLanes<A>; ++i) lane[i] = static_cast<Index>(x + i);
#pragma GCC unroll 4
    for (int u = 0; u < kTaps; ++u) {
      const Vector product = *reinterpret_cast<const Vector*>(grad + x) *
                             *reinterpret_cast<const Unaligned*>(line + u * tap_step + x);
      sum[u] += lane < static_cast<Index>(count) ? product : Vector{};
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kTaps; ++u) sums[u] += sum[u];
}

// sums[tap][lane] of output channel k, to be added over the lanes; `grad` and `line` hold one row
// each and a vector more.
template <typename T>
static void depthwise_row_by_pixel(const ConvBackwardWeightParams& p, const Correlation& c,
                                   const OutputRow& row, int64_t k, Accumulator<T>* grad,
                                   Accumulator<T>* line,
                                   typename VectorOf<Accumulator<T>>::type* sums) {
  using A = Accumulator<T>;
  const int64_t count = c.count[2];
  pack_row(grad, padded<A>(count),
           static_cast<const T*>(p.grad_output) + row.n * c.dest_stride.outer +
               k * c.dest_stride.channel + row.z * c.dest_stride.space[0] +
               row.y * c.dest_stride.space[1],
           c.dest_stride.space[2], 0, 1, count);
  const T* image = static_cast<const T*>(c.source) + row.n * c.source_stride.outer +
                   k / c.rows * c.source_stride.channel;
  for (int64_t w = 0; w < c.taps[0]; ++w) {
    for (int64_t v = 0; v < c.taps[1]; ++v) {
      const int64_t z = c.start[0] + c.step[0] * row.z + c.tap_step[0] * w;
      const int64_t y = c.start[1] + c.step[1] * row.y + c.tap_step[1] * v;
      if (z < 0 || z >= c.source_size[0] || y < 0 || y >= c.source_size[1]) continue;
      const T* from = image + z * c.source_stride.space[0] + y * c.source_stride.space[1];
      const auto pack = [&](int64_t length, int64_t u) {
        pack_row(line, length, from, c.source_stride.space[2], c.start[2] + c.tap_step[2] * u,
                 int64_t{c.step[2]}, int64_t{c.source_size[2]});
      };
      auto* tap = sums + (w * c.taps[1] + v) * c.taps[2];
      // With a step each tap has a row of its own.
      const bool shared = c.step[2] == 1;
      if (shared) pack(count + int64_t{c.tap_step[2]} * (c.taps[2] - 1), 0);
      int64_t u = 0;
      for (; shared && c.taps[2] - u >= 3; u += 3) {
        row_taps<A, 3>(grad, line + c.tap_step[2] * u, c.tap_step[2], count, tap + u);
      }
      for (; u < c.taps[2]; ++u) {
        if (!shared) pack(count, u);
        row_taps<A, 1>(grad, shared ? line + c.tap_step[2] * u : line, 0, count, tap + u);
      }
    }
  }
  for (int64_t x = 0; x < count; x += kLanes<A>) {
    sums[num_taps(c)] += *reinterpret_cast<const typename VectorOf<A>::type*>(grad + x);
  }
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
  const int64_t blocks = ceil_div(channels, width);
  const DepthwiseShares work(by_channel ? 1 : channels, int64_t{c.batch} * c.count[0] * c.count[1]);
  const std::vector<AxisRun> x_runs = axis_runs(c, 2);
  const int64_t num_sums = num_taps(c) + 1;
  // For each block of channels and each share a vector of lanes per tap.
  const Scratch<A> partials(blocks * work.shares * num_sums * kLanes<A>);
  const auto partial = [&](int64_t block, int64_t share) {
    return reinterpret_cast<Vector*>(partials.data()) + (block * work.shares + share) * num_sums;
  };
  std::fill_n(partial(0, 0), blocks * work.shares * num_sums, Vector{});
  parallel_for(0, work.channels * work.shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t length = c.count[2] + int64_t{c.tap_step[2]} * (c.taps[2] - 1) + kLanes<A>;
    const Scratch<A> grad(padded<A>(c.count[2])), line(length);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel = item / work.shares, share = item % work.shares;
      for (int64_t i = work.begin(share); i < work.begin(share + 1); ++i) {
        const OutputRow row(c, i);
        if (!by_channel) {
          depthwise_row_by_pixel<T>(p, c, row, channel, grad.data(), line.data(),
                                    partial(channel, share));
          continue;
        }
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t first = block * width, count = channels - first;
          const auto add = count >= width ? depthwise_row_by_channel<true, T>
                                          : depthwise_row_by_channel<false, T>;
          add(p, c, x_runs, row, first, count, partial(block, share));
        }
      }
    }
  });
  for (int64_t k = 0; k < channels; ++k) {
    store_depthwise<T>(p, c, k, [&](int64_t tap) {
      A sum = 0;
      for (int64_t s = 0; s < work.shares; ++s) {
        const Vector lanes = partial(k / width, s)[tap];
        if (by_channel) {
          sum += lanes[k % width];
        } else {
          for (int64_t i = 0; i < kLanes<A>; ++i) sum += lanes[i];
        }
      }
      return sum;
    });
  }
}
