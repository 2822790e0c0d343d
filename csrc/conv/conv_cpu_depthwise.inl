// Depthwise correlation of channels-last tensors (one source and one destination channel in a
// group, so that group = channel): vectors run along channels, every tap is one multiply-add of a
// pixel's channels, nothing is packed but the weight. Contiguous tensors take the planar engine.

template <typename T>
static inline typename VectorOf<Accumulator<T>>::type load_vector(const T* from, int64_t count) {
  using A = Accumulator<T>;
  using Vector = typename VectorOf<A>::type;
  if constexpr (std::is_same_v<T, A>) {
    if (count >= kLanes<A>) {
      return Vector(*reinterpret_cast<const typename VectorOf<A>::unaligned_type*>(from));
    }
  }
  alignas(64) A lanes[kLanes<A>];
  if (count >= kLanes<A>) {
    for (int64_t i = 0; i < kLanes<A>; ++i) lanes[i] = load(from[i]);
  } else {
    for (int64_t i = 0; i < kLanes<A>; ++i) lanes[i] = i < count ? A(load(from[i])) : A(0);
  }
  return *reinterpret_cast<const Vector*>(lanes);
}

// The taps of each destination position that read inside the source, [first, last).
struct TapRange {
  int64_t first, last;
};

static std::vector<TapRange> tap_ranges(const Correlation& c, int axis) {
  std::vector<TapRange> ranges(c.count[axis]);
  for (int64_t j = 0; j < c.count[axis]; ++j) {
    int64_t first = -1, last = 0;
    for (int64_t u = 0; u < c.taps[axis]; ++u) {
      const int64_t at = c.start[axis] + c.step[axis] * j + c.tap_step[axis] * u;
      if (at < 0 || at >= c.source_size[axis]) continue;
      if (first < 0) first = u;
      last = u + 1;
    }
    ranges[j] = {std::max<int64_t>(0, first), last};
  }
  return ranges;
}

struct DepthwisePlan {
  std::vector<TapRange> z, y, x;
  int64_t channels, padded_channels;
};

// kVectors vectors of channels of one destination pixel: sums[] (+)= the taps that lie inside.
// `source` and `weight` begin at the block's first channel, source at position (0, 0, 0).
template <typename T, int kVectors>
static inline void depthwise_pixel(const Correlation& c, const DepthwisePlan& plan, int64_t z,
                                   int64_t y, int64_t x, const T* source,
                                   const Accumulator<T>* weight, int64_t channels,
                                   Accumulator<T>* sums) {
  using A = Accumulator<T>;
  using Vector = typename VectorOf<A>::type;
  Vector sum[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) sum[i] = *reinterpret_cast<Vector*>(sums + i * kLanes<A>);
  const int64_t first_x = c.start[2] + c.step[2] * x;
  for (int64_t w = plan.z[z].first; w < plan.z[z].last; ++w) {
    for (int64_t v = plan.y[y].first; v < plan.y[y].last; ++v) {
      const T* line = source +
                      (c.start[0] + c.step[0] * z + c.tap_step[0] * w) * c.source_stride.space[0] +
                      (c.start[1] + c.step[1] * y + c.tap_step[1] * v) * c.source_stride.space[1];
      const A* taps = weight + (w * c.taps[1] + v) * c.taps[2] * plan.padded_channels;
      for (int64_t u = plan.x[x].first; u < plan.x[x].last; ++u) {
        const T* pixel = line + (first_x + c.tap_step[2] * u) * c.source_stride.space[2];
        const A* tap = taps + u * plan.padded_channels;
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
          sum[i] += load_vector(pixel + i * kLanes<A>, channels - i * kLanes<A>) *
                    *reinterpret_cast<const Vector*>(tap + i * kLanes<A>);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) *reinterpret_cast<Vector*>(sums + i * kLanes<A>) = sum[i];
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
static void correlate_depthwise(const Correlation& c) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = 4 * kLanes<A>;
  const int64_t ld = padded<A>(c.groups);
  const DepthwisePlan plan{tap_ranges(c, 0), tap_ranges(c, 1), tap_ranges(c, 2), c.groups, ld};
  const Scratch<A> weight(num_taps(c) * ld), bias(ld);
  pack_depthwise_weight<T>(c, ld, weight.data());
  if (c.maybe_bias != nullptr) {
    pack_row(bias.data(), ld, static_cast<const T*>(c.maybe_bias), 1, 0, 1, int64_t{c.groups});
  } else {
    std::fill(bias.data(), bias.data() + ld, A(0));
  }
  const int64_t rows = int64_t{c.batch} * c.count[0] * c.count[1];
  const int64_t cost = c.count[2] * ld * (num_taps(c) + 2);
  const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(1, cost));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const Scratch<A> sums(ld);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % c.count[1], z = row / c.count[1] % c.count[0];
      const int64_t n = row / c.count[1] / c.count[0];
      const T* source = static_cast<const T*>(c.source) + n * c.source_stride.outer;
      for (int64_t x = 0; x < c.count[2]; ++x) {
        std::copy(bias.data(), bias.data() + ld, sums.data());
        int64_t first = 0;
        for (; c.groups - first >= kBlock; first += kBlock) {
          depthwise_pixel<T, 4>(c, plan, z, y, x, source + first, weight.data() + first, kBlock,
                                sums.data() + first);
        }
        for (; first < c.groups; first += kLanes<A>) {
          depthwise_pixel<T, 1>(c, plan, z, y, x, source + first, weight.data() + first,
                                c.groups - first, sums.data() + first);
        }
        const int64_t offset = n * c.dest_stride.outer + z * c.dest_stride.space[0] +
                               y * c.dest_stride.space[1] + x * c.dest_stride.space[2];
        finish_row<T>(c, sums.data(), c.groups,
                      [&](const auto& visit) { visit(0, c.groups, offset, int64_t{1}); });
      }
    }
  });
}
