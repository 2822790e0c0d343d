// The engine for results whose channels lie side by side (channels-last tensors): vectors run along
// destination channels.
//
// A matrix product of pixels by channels: the left side is the source, read through a GatherPlan's
// two tables, the right side is the weight.

// The channels first .. first + count - 1 of each pixel, finished.
template <typename T>
static void finish_interleaved(const Correlation& c, int64_t group, int64_t first, int64_t count,
                               const std::vector<int64_t>& dest, Accumulator<T>* sums, int64_t ld,
                               const Accumulator<T>* bias) {
  const int64_t stride = c.dest_stride.channel;
  const int64_t channel = (group * c.rows + first) * stride;
  for (const int64_t pixel : dest) {
    for (int64_t i = 0; i < count; ++i) sums[i] += bias[i];
    finish_row<T>(c, sums, count,
                  [&](const auto& visit) { visit(0, count, pixel + channel, stride); });
    sums += ld;
  }
}

template <typename T>
static void correlate_interleaved(const Correlation& c) {
  using A = Accumulator<T>;
  const GatherPlan plan = GatherPlan::make(c, 192, std::is_same_v<T, A>);
  constexpr int64_t kWidth = 3 * kLanes<A>;
  const int64_t taps = num_taps(c), k = c.depth * taps, panels = ceil_div(c.rows, kWidth);
  const Scratch<A> weights = pack_weights<T>(c, kWidth);
  const int64_t units = plan.units.size() * c.groups;
  const int64_t parts = std::max<int64_t>(1, std::min(panels, 8 / std::max<int64_t>(1, units)));
  const int64_t part = ceil_div(panels, parts), ld = part * kWidth;
  const UnitShape& shape = plan.units.shape;
  const int64_t pixels = shape.images * shape.rows * shape.columns;
  const int64_t cost = pixels * (ceil_div(k * c.rows, parts) + 8);
  const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(1, cost));

  parallel_for(0, units * parts, grain, [&](int64_t begin, int64_t end) {
    const Scratch<A> tile(plan.tile_size);
    const Scratch<A> sums(pixels * ld), bias(ld);
    std::vector<int64_t> source, dest;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t group = index / parts % c.groups;
      const Unit unit = plan.units.at(index / parts / c.groups);
      const int64_t first = index % parts * part, last = std::min(panels, first + part);
      if (first >= last) continue;
      plan.list_pixels(c, unit, source, dest);
      const int64_t num_pixels = source.size();
      for (int64_t d = 0; d < std::max<int64_t>(1, c.depth); d += plan.chunk) {
        const int64_t channels = std::min(plan.chunk, c.depth - d);
        const A* from = gather_source<T>(c, plan, unit, group, d, channels, tile.data());
        for (int64_t p = first; p < last; ++p) {
          const A* panel = weights.data() + ((group * panels + p) * k + d * taps) * kWidth;
          blocked_sums<A>(num_pixels, std::min(kWidth, c.rows - p * kWidth), channels * taps, from,
                          Listed{source.data()}, Listed{plan.offsets.data()}, panel, Spaced{kWidth},
                          sums.data() + (p - first) * kWidth, ld, d > 0);
        }
      }
      const int64_t channel = first * kWidth, count = std::min(part * kWidth, c.rows - channel);
      const T* from = static_cast<const T*>(c.maybe_bias);
      for (int64_t i = 0; i < count; ++i) {
        bias.data()[i] = from == nullptr ? A(0) : A(load(from[group * c.rows + channel + i]));
      }
      finish_interleaved<T>(c, group, channel, count, dest, sums.data(), ld, bias.data());
    }
  });
}
