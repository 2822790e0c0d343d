// What all CPU engines share: reading a piece of the source into a padded tile, writing sums out
// with bias and activation, packing weights, transpositions on the way.

// Source positions first, first + step, ... of a row of `size` elements, zero where outside.
template <typename T, typename A>
static inline void pack_row(A* out, int64_t count, const T* row, int64_t stride, int64_t first,
                            int64_t step, int64_t size) {
  const int64_t begin = std::min(count, first >= 0 ? 0 : (step - 1 - first) / step);
  const int64_t inside = first >= size ? 0 : (size - 1 - first) / step + 1;
  const int64_t end = std::max(begin, std::min(count, inside));
  for (int64_t i = 0; i < begin; ++i) out[i] = 0;
  if (begin < end) {
    const int64_t spacing = stride * step;
    const T* from = row + (first + begin * step) * stride;
    A* to = out + begin;
    if (spacing == 1) {
      for (int64_t i = 0; i < end - begin; ++i) to[i] = load(from[i]);
    } else {
      for (int64_t i = 0; i < end - begin; ++i) to[i] = load(from[i * spacing]);
    }
  }
  for (int64_t i = end; i < count; ++i) out[i] = 0;
}

template <typename T, typename A>
static inline void store_row(T* out, int64_t stride, const A* from, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = store<T>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i * stride] = store<T>(from[i]);
  }
}

// The steps of a weight in the order of a sum: evenly spaced runs, and where each begins.
struct WeightRuns {
  int64_t count = 1, stride = 1;  // of a run
  std::vector<int64_t> first;

  WeightRuns(const Correlation& c, const StepOrder& order) {
    std::vector<std::pair<int64_t, int64_t>> axes;  // count, stride; slow to fast
    for (int axis = 0; axis < 3; ++axis) axes.push_back({c.taps[axis], c.weight_stride.tap[axis]});
    axes.insert(order.tap_major ? axes.end() : axes.begin(), {c.depth, c.weight_stride.depth});
    for (; !axes.empty(); axes.pop_back()) {
      const auto [n, spacing] = axes.back();
      if (n == 1) continue;
      if (count > 1 && spacing != count * stride) break;
      if (count == 1) stride = spacing;
      count *= n;
    }
    first.push_back(0);
    for (const auto& [n, spacing] : axes) {
      const std::vector<int64_t> slower = std::exchange(first, {});
      for (const int64_t offset : slower) {
        for (int64_t i = 0; i < n; ++i) first.push_back(offset + i * spacing);
      }
    }
  }
};

// Weights as panels [group][panel][step][width], zeros behind the last row, so that the engines
// read them in the order of their sums: panel p holds rows p * width and on.
template <typename T>
static Scratch<Accumulator<T>> pack_weights(const Correlation& c, const StepOrder& order,
                                            int64_t width) {
  const int64_t panels = ceil_div(c.rows, width), row_stride = c.weight_stride.row;
  Scratch<Accumulator<T>> packed(std::max<int64_t>(1, c.groups * panels * order.size() * width));
  if (order.size() == 0) return packed;
  const WeightRuns runs(c, order);
  const int64_t num_runs = runs.first.size();
  const T* const weight = static_cast<const T*>(c.weight);
  const T* const end = weight + (c.groups - 1) * c.weight_stride.group + (c.rows - 1) * row_stride +
                       runs.first.back() + (runs.count - 1) * runs.stride + 1;
  const int64_t grain = std::max<int64_t>(1, 16384 / (runs.count * width));
  parallel_for(0, c.groups * panels * num_runs, grain, [&](int64_t begin, int64_t stop) {
    for (int64_t index = begin; index < stop; ++index) {
      const int64_t panel = index / num_runs, row = panel % panels * width;
      const int64_t rows = std::min(width, c.rows - row);
      const T* from = weight + panel / panels * c.weight_stride.group + row * row_stride +
                      runs.first[index % num_runs];
      auto* to = packed.data() + index * runs.count * width;
      if (runs.stride == 1 && row_stride != 1) {
        transpose(to, width, from, row_stride, rows, runs.count, end);
      } else {
        for (int64_t i = 0; i < runs.count; ++i) {
          pack_row(to + i * width, rows, from + i * runs.stride, row_stride, 0, 1, rows);
        }
      }
      if (rows == width) continue;
      for (int64_t i = 0; i < runs.count; ++i) {
        std::fill(to + i * width + rows, to + (i + 1) * width, Accumulator<T>(0));
      }
    }
  });
  return packed;
}

// The same as elements of a product: numbers are elements already.
template <typename T, typename E>
static Scratch<E> weight_elements(const Correlation& c, const StepOrder& order, int64_t width) {
  if constexpr (kSteps<E> == 1) {
    return pack_weights<T>(c, order, width);
  }
#if FUSED_BFLOAT16_PAIRS
  else {
    const StepOrder by_one(c.depth, c.taps, c.weight_stride.depth, c.weight_stride.tap[2]);
    const Scratch<float> numbers = pack_weights<T>(c, by_one, width);
    const int64_t panels = c.groups * ceil_div(c.rows, width), steps = order.size();
    Scratch<Pair> packed(std::max<int64_t>(1, panels * steps * width));
    const Scratch<float> zeros(width);
    std::fill(zeros.data(), zeros.data() + width, 0.0f);
    const int64_t taps = order.num_taps();
    const int64_t grain = std::max<int64_t>(1, 16384 / width);
    parallel_for(0, panels * steps, grain, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t panel = index / steps, step = index % steps;
        const int64_t d = 2 * (order.tap_major ? step % order.channels : step / taps);
        const int64_t tap = order.tap_major ? step / order.channels : step % taps;
        const float* const from = numbers.data() + panel * by_one.size() * width;
        const float* const low = from + by_one.at(d, tap) * width;
        const float* const high =
            d + 1 < c.depth ? from + by_one.at(d + 1, tap) * width : zeros.data();
        for (int64_t i = 0; i < width; i += kLanes<Pair>) {
          store_pairs(low + i, high + i, packed.data() + index * width + i);
        }
      }
    });
    return packed;
  }
#endif
}

// Rows of finished sums get their bias, are kept if the backward pass wants them, go through the
// activation and out. `for_each_run(visit)` calls visit(first, length, dest_offset, dest_stride).
template <typename T, typename Runs>
static inline void finish_row(const Correlation& c, Accumulator<T>* sums, int64_t count,
                              const Runs& for_each_run) {
  if (c.maybe_pre != nullptr) {
    for_each_run([&](int64_t first, int64_t length, int64_t offset, int64_t stride) {
      store_row(static_cast<T*>(c.maybe_pre) + offset, stride, sums + first, length);
    });
  }
  activate(c.activation, sums, count);
  for_each_run([&](int64_t first, int64_t length, int64_t offset, int64_t stride) {
    store_row(static_cast<T*>(c.dest) + offset, stride, sums + first, length);
  });
}

// The elements of `count` times `whole` channels of a unit's piece of the source, into its tile.
template <typename T, typename E>
static void pack_channels(const Correlation& c, const SourcePlan& plan, const Unit& unit,
                          const SourceView& view, const T* source, int64_t count, bool whole,
                          E* tile) {
  const int64_t channel_stride = c.source_stride.channel;
  BoxAxis<2> space[3];  // strides of the source and of the tile
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t inside = c.source_size[axis] - view.origin[axis];
    if (inside <= 0) return;
    source += view.origin[axis] * c.source_stride.space[axis];
    space[axis] = {std::min(plan.extent[axis], inside),
                   {c.source_stride.space[axis], view.stride.space[axis]}};
  }
  const BoxAxis<2> image{unit.images, {c.source_stride.outer, view.stride.outer}};
  const BoxAxis<2> channel{count, {kSteps<E> * channel_stride, view.stride.channel}};
  const Box<2> box =
      collapse<2>(plan.by_channel ? Box<2>{image, space[0], space[1], space[2], channel}
                                  : Box<2>{image, channel, space[0], space[1], space[2]});
  const auto nest = [&](const auto& self, int axis, const T* from, E* to) -> void {
    const auto& [size, stride] = box[axis];
    if (axis == 4)
      return pack_elements(to, stride[1], from, stride[0], size, channel_stride, whole);
    for (int64_t i = 0; i < size; ++i) {
      self(self, axis + 1, from + i * stride[0], to + i * stride[1]);
    }
  };
  nest(nest, 0, source, tile);
}

// What the offsets of Products point into for this unit, from the channel `first` on: the source
// itself or `channels` of it in a tile of the SourcePlan, as elements of a product.
template <typename T, typename E>
static const E* read_source(const Correlation& c, const SourcePlan& plan, const Unit& unit,
                            const SourceView& view, int64_t first, int64_t channels, E* tile) {
  const T* source = static_cast<const T*>(c.source) + unit.image * c.source_stride.outer +
                    first * c.source_stride.channel;
  if constexpr (std::is_same_v<T, E>) {
    if (plan.direct) return source;
  }
  const int64_t whole = channels / kSteps<E>;
  pack_channels<T>(c, plan, unit, view, source, whole, true, tile);
  if (channels % kSteps<E> != 0) {
    pack_channels<T>(c, plan, unit, view, source + whole * kSteps<E> * c.source_stride.channel, 1,
                     false, tile + whole * view.stride.channel);
  }
  return tile;
}

// C (+)= A B as indexed_block_gemm, long sums in blocks of kStepsInBlock: a single chain would lose
// a digit more than the blocked products of a library do.
template <typename E, typename RowsA, typename StepsA, typename StepsB, typename RowsC>
static inline void blocked_sums(int64_t m, int64_t n, int64_t k, const E* a, RowsA rows_a,
                                StepsA steps_a, const E* b, StepsB steps_b, ProductSum<E>* c,
                                RowsC rows_c, bool accumulate) {
  constexpr int64_t kStepsInBlock = 96;
  int64_t first = 0;
  do {
    const int64_t steps = std::min(kStepsInBlock, k - first);
    indexed_block_gemm<E>(m, n, steps, a, rows_a, steps_a.from(first), b, steps_b.from(first), c,
                          rows_c, accumulate || first > 0);
    first += steps;
  } while (first < k);
}
