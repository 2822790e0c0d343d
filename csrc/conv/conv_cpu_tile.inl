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

template <typename T>
static inline typename VectorOf<Accumulator<T>>::type load_vector(const T* from) {
  using A = Accumulator<T>;
  alignas(64) A lanes[kLanes<A>];
  for (int64_t i = 0; i < kLanes<A>; ++i) lanes[i] = load(from[i]);
  return *reinterpret_cast<const typename VectorOf<A>::type*>(lanes);
}

template <typename T>
static inline void store_vector(T* to, typename VectorOf<Accumulator<T>>::type vector) {
  using A = Accumulator<T>;
  alignas(64) A lanes[kLanes<A>];
  *reinterpret_cast<typename VectorOf<A>::type*>(lanes) = vector;
  for (int64_t i = 0; i < kLanes<A>; ++i) to[i] = store<T>(lanes[i]);
}

// The lower or the upper halves of a and b, element by element in turn.
template <typename A, bool kUpper, size_t... I>
static inline typename VectorOf<A>::type interleave(typename VectorOf<A>::type a,
                                                    typename VectorOf<A>::type b,
                                                    std::index_sequence<I...>) {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr int64_t kFirst = kUpper ? kLanes<A> / 2 : 0;
  return __builtin_shuffle(a, b,
                           typename VectorOf<Index>::type{kFirst + I / 2 + I % 2 * kLanes<A>...});
}

// to[i * ld_to + r] = from[r * ld_from + i] for a block of lanes by lanes, of which the first
// `columns` i are stored: perfect shuffles, as many as halvings make a vector one element.
template <typename To, typename From>
static inline void transpose_block(To* to, int64_t ld_to, const From* from, int64_t ld_from,
                                   int64_t columns) {
  using A = Accumulator<To>;
  using Vector = typename VectorOf<A>::type;
  constexpr int64_t kSize = kLanes<A>;
  constexpr auto kIndices = std::make_index_sequence<kSize>{};
  Vector rows[kSize], next[kSize];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kSize; ++r) rows[r] = load_vector(from + r * ld_from);
#pragma GCC unroll 4
  for (int64_t half = kSize; half > 1; half /= 2) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < kSize / 2; ++r) {
      next[2 * r] = interleave<A, false>(rows[r], rows[r + kSize / 2], kIndices);
      next[2 * r + 1] = interleave<A, true>(rows[r], rows[r + kSize / 2], kIndices);
    }
#pragma GCC unroll 16
    for (int64_t r = 0; r < kSize; ++r) rows[r] = next[r];
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kSize; ++i) {
    if (i < columns) store_vector(to + i * ld_to, rows[i]);
  }
}

// The same for a block of any size: four rows at a time, so that what it writes comes in runs.
template <typename To, typename From>
static inline void transpose_rest(To* to, int64_t ld_to, const From* from, int64_t ld_from,
                                  int64_t rows, int64_t columns) {
  for (; rows >= 4; rows -= 4, from += 4 * ld_from, to += 4) {
    for (int64_t i = 0; i < columns; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) to[i * ld_to + j] = store<To>(load(from[j * ld_from + i]));
    }
  }
  for (; rows > 0; --rows, from += ld_from, ++to) {
    for (int64_t i = 0; i < columns; ++i) to[i * ld_to] = store<To>(load(from[i]));
  }
}

// to[i * ld_to + r] = from[r * ld_from + i] for r < rows, i < columns. Elements before `readable`
// may be read, whether they are part of the block or not.
template <typename To, typename From>
static inline void transpose(To* to, int64_t ld_to, const From* from, int64_t ld_from, int64_t rows,
                             int64_t columns, const From* readable) {
  constexpr int64_t kSize = kLanes<Accumulator<To>>;
  int64_t r = 0;
  for (; r + kSize <= rows; r += kSize, from += kSize * ld_from) {
    for (int64_t i = 0; i < columns; i += kSize) {
      const int64_t left = std::min(kSize, columns - i);
      const bool whole = left == kSize || readable - from >= (kSize - 1) * ld_from + i + kSize;
      if (whole) {
        transpose_block(to + i * ld_to + r, ld_to, from + i, ld_from, left);
      } else {
        transpose_rest(to + i * ld_to + r, ld_to, from + i, ld_from, kSize, left);
      }
    }
  }
  transpose_rest(to + r, ld_to, from, ld_from, rows - r, columns);
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

// A tile of a SourcePlan: the piece of the source that a unit reads, in accumulators.
template <typename T>
static void pack_source(const Correlation& c, const SourcePlan& plan, const Unit& unit,
                        const SourceView& view, const T* source, Accumulator<T>* tile) {
  struct Axis {
    int64_t count, from, to;
  };
  Axis space[3];
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t inside = c.source_size[axis] - view.origin[axis];
    if (inside <= 0) return;
    source += view.origin[axis] * c.source_stride.space[axis];
    space[axis] = {std::min(plan.extent[axis], inside), c.source_stride.space[axis],
                   view.stride.space[axis]};
  }
  const Axis image{unit.images, c.source_stride.outer, view.stride.outer};
  const Axis channel{plan.channels, c.source_stride.channel, view.stride.channel};
  const Axis by_channel[5] = {image, space[0], space[1], space[2], channel};
  const Axis planar[5] = {image, channel, space[0], space[1], space[2]};
  // Slow to fast; neighbours that are dense on both sides are one axis.
  Axis axes[5] = {{1, 0, 0}, {1, 0, 0}, {1, 0, 0}, {1, 0, 0}, {1, 1, 1}};
  int fastest = 5;
  for (int i = 4; i >= 0; --i) {
    const Axis axis = plan.by_channel ? by_channel[i] : planar[i];
    if (axis.count == 1) continue;
    Axis& faster = axes[fastest < 5 ? fastest : 4];
    if (fastest < 5 && axis.from == faster.count * faster.from &&
        axis.to == faster.count * faster.to) {
      faster.count *= axis.count;
    } else {
      axes[--fastest] = axis;
    }
  }
  const auto copy = [&](const T* from, Accumulator<T>* to) {
    const Axis& run = axes[4];
    if (run.to == 1) return pack_row(to, run.count, from, run.from, 0, 1, run.count);
    for (int64_t i = 0; i < run.count; ++i) to[i * run.to] = load(from[i * run.from]);
  };
  const auto nest = [&](const auto& self, int depth, const T* from, Accumulator<T>* to) -> void {
    if (depth == 4) return copy(from, to);
    for (int64_t i = 0; i < axes[depth].count; ++i) {
      self(self, depth + 1, from + i * axes[depth].from, to + i * axes[depth].to);
    }
  };
  nest(nest, std::min(fastest, 4), source, tile);
}

// What the offsets of Products point into for this unit, from the channel `first` on.
template <typename T>
static const Accumulator<T>* read_source(const Correlation& c, const SourcePlan& plan,
                                         const Unit& unit, const SourceView& view, int64_t first,
                                         Accumulator<T>* tile) {
  const T* source = static_cast<const T*>(c.source) + unit.image * c.source_stride.outer +
                    first * c.source_stride.channel;
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    if (plan.direct) return source;
  }
  pack_source<T>(c, plan, unit, view, source, tile);
  return tile;
}

// C (+)= A B as indexed_block_gemm, long sums in blocks of kStepsInBlock: a single chain would lose
// a digit more than the blocked products of a library do.
template <typename A, typename RowsA, typename StepsA, typename StepsB, typename RowsC>
static inline void blocked_sums(int64_t m, int64_t n, int64_t k, const A* a, RowsA rows_a,
                                StepsA steps_a, const A* b, StepsB steps_b, A* c, RowsC rows_c,
                                bool accumulate) {
  constexpr int64_t kStepsInBlock = 96;
  int64_t first = 0;
  do {
    const int64_t steps = std::min(kStepsInBlock, k - first);
    indexed_block_gemm<A>(m, n, steps, a, rows_a, steps_a.from(first), b, steps_b.from(first), c,
                          rows_c, accumulate || first > 0);
    first += steps;
  } while (first < k);
}
