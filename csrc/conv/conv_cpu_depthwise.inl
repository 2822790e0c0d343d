// Depthwise correlation of channels-last tensors (one source and one destination channel in a
// group, so that group = channel): vectors run along channels, every tap is one multiply-add of a
// pixel's channels, nothing is packed but the weight. Contiguous tensors take the planar engine.

// The first `count` of a vector of channels, zeros behind; all of them where kWhole says so at
// compile time, because a test at every load would cost as much as the arithmetic.
template <bool kWhole, typename T>
static inline typename VectorOf<Accumulator<T>>::type load_channels(const T* from, int64_t count) {
  using A = Accumulator<T>;
  using Vector = typename VectorOf<A>::type;
  if constexpr (kWhole && std::is_same_v<T, A>) {
    return Vector(*reinterpret_cast<const typename VectorOf<A>::unaligned_type*>(from));
  } else {
    alignas(64) A lanes[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      lanes[i] = kWhole || i < count ? A(load(from[i])) : A(0);
    }
    return *reinterpret_cast<const Vector*>(lanes);
  }
}

// kVectors vectors of channels of kPixels neighbouring destination pixels, which meet the same
// taps: sums[pixel][ld] = bias plus the taps that lie inside. All pointers begin at the first
// channel, `source` at the first pixel's position (start + step * position) and tap (0, 0, 0).
template <typename T, int kPixels, int kVectors, bool kWhole>
static inline void depthwise_pixels(const Correlation& c, const AxisRun& z, const AxisRun& y,
                                    const AxisRun& x, const T* source, const Accumulator<T>* bias,
                                    const Accumulator<T>* weight, int64_t ld, int64_t channels,
                                    Accumulator<T>* sums) {
  using A = Accumulator<T>;
  using Vector = typename VectorOf<A>::type;
  const int64_t next = c.step[2] * c.source_stride.space[2];
  Vector sum[kPixels][kVectors];
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sum[p][i] = *reinterpret_cast<const Vector*>(bias + i * kLanes<A>);
    }
  }
  for (int64_t w = z.taps.begin; w < z.taps.end; ++w) {
    for (int64_t v = y.taps.begin; v < y.taps.end; ++v) {
      const T* line = source + c.tap_step[0] * w * c.source_stride.space[0] +
                      c.tap_step[1] * v * c.source_stride.space[1];
      const A* taps = weight + (w * c.taps[1] + v) * c.taps[2] * ld;
      for (int64_t u = x.taps.begin; u < x.taps.end; ++u) {
        const T* pixel = line + c.tap_step[2] * u * c.source_stride.space[2];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          const Vector tap = *reinterpret_cast<const Vector*>(taps + u * ld + i * kLanes<A>);
#pragma GCC unroll 4
          for (int p = 0; p < kPixels; ++p) {
            const T* from = pixel + p * next + i * kLanes<A>;
            sum[p][i] += load_channels<kWhole>(from, channels - i * kLanes<A>) * tap;
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      *reinterpret_cast<Vector*>(sums + p * ld + i * kLanes<A>) = sum[p][i];
    }
  }
}

// The weight as [tap][channel], whole vectors of channels.
template <typename T>
static void pack_depthwise_weight(const Correlation& c, int64_t ld, Accumulator<T>* out) {
  for (int64_t w = 0; w < c.taps[0]; ++w) {
    for (int64_t v = 0; v < c.taps[1]; ++v) {
      for (int64_t u = 0; u < c.taps[2]; ++u, out += ld) {
        const T* from = static_cast<const T*>(c.weight) + w * c.weight_stride.tap[0] +
                        v * c.weight_stride.tap[1] + u * c.weight_stride.tap[2];
        pack_row(out, ld, from, c.weight_stride.group, 0, 1, int64_t{c.groups});
      }
    }
  }
}

template <typename T>
struct DepthwiseCorrelation {
  using A = Accumulator<T>;
  const Correlation& c;
  std::vector<AxisRun> runs[3];
  int64_t ld;
  Scratch<A> weight, bias;

  explicit DepthwiseCorrelation(const Correlation& c)
      : c(c),
        runs{axis_runs(c, 0), axis_runs(c, 1), axis_runs(c, 2)},
        ld(padded<A>(c.groups)),
        weight(num_taps(c) * ld),
        bias(ld) {
    pack_depthwise_weight<T>(c, ld, weight.data());
    const T* from = static_cast<const T*>(c.maybe_bias);
    for (int64_t i = 0; i < ld; ++i) {
      bias.data()[i] = from != nullptr && i < c.groups ? A(load(from[i])) : A(0);
    }
  }

  static const AxisRun& run_of(const std::vector<AxisRun>& runs, int64_t position) {
    return *std::find_if(runs.begin(), runs.end(),
                         [=](const AxisRun& run) { return position < run.positions.end; });
  }

  // kPixels pixels from `from` on, all channels, to `offset` in the destination.
  template <int kPixels>
  void pixels(const AxisRun& z, const AxisRun& y, const AxisRun& x, const T* from, int64_t offset,
              A* sums) const {
    int64_t first = 0;
    const auto block = [&](auto vectors, auto whole) {
      constexpr int kVectors = decltype(vectors)::value;
      depthwise_pixels<T, kPixels, kVectors, decltype(whole)::value>(
          c, z, y, x, from + first, bias.data() + first, weight.data() + first, ld,
          c.groups - first, sums + first);
      first += kVectors * kLanes<A>;
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    while (c.groups - first >= 2 * kLanes<A>) block(two, std::true_type{});
    if (c.groups - first >= kLanes<A>) block(one, std::true_type{});
    if (first < c.groups) block(one, std::false_type{});
    for (int p = 0; p < kPixels; ++p, offset += c.dest_stride.space[2]) {
      finish_row<T>(c, sums + p * ld, c.groups,
                    [&](const auto& visit) { visit(0, c.groups, offset, int64_t{1}); });
    }
  }

  // One row of destination pixels.
  void row(int64_t n, int64_t j, int64_t i, A* sums) const {
    const ConvStrides& s = c.source_stride;
    const AxisRun &z = run_of(runs[0], j), &y = run_of(runs[1], i);
    const T* line = static_cast<const T*>(c.source) + n * s.outer +
                    (c.start[0] + c.step[0] * j) * s.space[0] +
                    (c.start[1] + c.step[1] * i) * s.space[1] + c.start[2] * s.space[2];
    const int64_t offset =
        n * c.dest_stride.outer + j * c.dest_stride.space[0] + i * c.dest_stride.space[1];
    const int64_t step = c.step[2] * s.space[2];
    for (const AxisRun& x : runs[2]) {
      int64_t at = x.positions.begin;
      for (; x.positions.end - at >= 4; at += 4) {
        pixels<4>(z, y, x, line + at * step, offset + at * c.dest_stride.space[2], sums);
      }
      for (; at < x.positions.end; ++at) {
        pixels<1>(z, y, x, line + at * step, offset + at * c.dest_stride.space[2], sums);
      }
    }
  }

  void run() const {
    const int64_t rows = int64_t{c.batch} * c.count[0] * c.count[1];
    const int64_t cost = c.count[2] * ld * (num_taps(c) + 2);
    const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(1, cost));
    parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      const Scratch<A> sums(4 * ld);
      for (int64_t r = begin; r < end; ++r) {
        row(r / c.count[1] / c.count[0], r / c.count[1] % c.count[0], r % c.count[1], sums.data());
      }
    });
  }
};

template <typename T>
static void correlate_depthwise(const Correlation& c) {
  DepthwiseCorrelation<T>(c).run();
}
