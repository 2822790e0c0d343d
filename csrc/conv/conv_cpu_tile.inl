// What all CPU engines share: reading a piece of the source into a padded tile, writing sums out
// with bias and activation, packing weights.

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

// out[i * ld + r] = element (r, i) of `rows` rows: a transposition that reads eight rows at a time,
// so that what it writes comes in runs.
template <typename T, typename A>
static inline void pack_transposed(A* out, int64_t ld, int64_t rows, int64_t count, const T* from,
                                   int64_t row_stride, int64_t stride) {
  constexpr int64_t kBlock = 8;
  int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) {
    const T* block = from + r * row_stride;
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < kBlock; ++j) {
        out[i * ld + r + j] = load(block[j * row_stride + i * stride]);
      }
    }
  }
  for (; r < rows; ++r) {
    for (int64_t i = 0; i < count; ++i) {
      out[i * ld + r] = load(from[r * row_stride + i * stride]);
    }
  }
}

template <typename T, typename A>
static inline void store_row(T* out, int64_t stride, const A* from, int64_t count) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = store<T>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i * stride] = store<T>(from[i]);
  }
}

// Weights as panels [group][panel][depth * taps][width], zeros behind the last row, so that the
// engines read them in the order of their sums: panel p holds rows p * width and on.
template <typename T>
static Scratch<Accumulator<T>> pack_weights(const Correlation& c, int64_t width) {
  using A = Accumulator<T>;
  const int64_t taps = num_taps(c), k = c.depth * taps, panels = ceil_div(c.rows, width);
  Scratch<A> packed(std::max<int64_t>(1, c.groups * panels * k * width));
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, k * width));
  parallel_for(0, c.groups * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index % panels * width, rows = std::min(width, c.rows - row);
      const T* from = static_cast<const T*>(c.weight) + index / panels * c.weight_stride.group +
                      row * c.weight_stride.row;
      A* to = packed.data() + index * k * width;
      for (int64_t d = 0; d < c.depth; ++d) {
        for (int64_t z = 0; z < c.taps[0]; ++z) {
          for (int64_t y = 0; y < c.taps[1]; ++y) {
            const T* line = from + d * c.weight_stride.depth + z * c.weight_stride.tap[0] +
                            y * c.weight_stride.tap[1];
            for (int64_t x = 0; x < c.taps[2]; ++x, line += c.weight_stride.tap[2], to += width) {
              for (int64_t r = 0; r < rows; ++r) to[r] = load(line[r * c.weight_stride.row]);
              for (int64_t r = rows; r < width; ++r) to[r] = 0;
            }
          }
        }
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

// Packs a unit's tile of a GatherPlan.
template <typename T>
static void pack_gather_tile(const Correlation& c, const GatherPlan& plan, const Unit& unit,
                             const T* source, int64_t channels, Accumulator<T>* tile) {
  const int64_t first_z = c.start[0] + c.step[0] * unit.z + plan.lowest[0];
  const int64_t first_y = c.start[1] + c.step[1] * unit.y + plan.lowest[1];
  const int64_t first_x = c.start[2] + c.step[2] * unit.x + plan.lowest[2];
  for (int64_t i = 0; i < unit.images; ++i) {
    for (int64_t z = 0; z < plan.size[0]; ++z) {
      for (int64_t y = 0; y < plan.size[1]; ++y) {
        const int64_t at_z = first_z + z, at_y = first_y + y;
        const bool inside =
            at_z >= 0 && at_z < c.source_size[0] && at_y >= 0 && at_y < c.source_size[1];
        const T* from = source + (unit.image + i) * c.source_stride.outer;
        if (inside) from += at_z * c.source_stride.space[0] + at_y * c.source_stride.space[1];
        Accumulator<T>* line = tile + i * plan.image + z * plan.space[0] + y * plan.space[1];
        if (!plan.by_channel) {
          for (int64_t d = 0; d < channels; ++d) {
            pack_row(line + d * plan.channel, plan.size[2], from + d * c.source_stride.channel,
                     c.source_stride.space[2], first_x, 1, inside ? int64_t{c.source_size[2]} : 0);
          }
          continue;
        }
        for (int64_t x = 0; x < plan.size[2]; ++x) {
          const int64_t at_x = first_x + x;
          const bool valid = inside && at_x >= 0 && at_x < c.source_size[2];
          pack_row(line + x * plan.space[2], channels,
                   from + (valid ? at_x * c.source_stride.space[2] : 0), 1, 0, 1,
                   valid ? channels : 0);
        }
      }
    }
  }
}

// What the tables of a GatherPlan point into for this unit and these channels.
template <typename T>
static const Accumulator<T>* gather_source(const Correlation& c, const GatherPlan& plan,
                                           const Unit& unit, int64_t group, int64_t first_channel,
                                           int64_t channels, Accumulator<T>* tile) {
  const T* source =
      static_cast<const T*>(c.source) + (group * c.depth + first_channel) * c.source_stride.channel;
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    if (plan.direct) {
      const int64_t at[3] = {unit.z, unit.y, unit.x};
      source += unit.image * c.source_stride.outer;
      for (int axis = 0; axis < 3; ++axis) {
        source += (c.start[axis] + c.step[axis] * at[axis] + plan.lowest[axis]) *
                  c.source_stride.space[axis];
      }
      return source;
    }
  }
  pack_gather_tile<T>(c, plan, unit, source, channels, tile);
  return tile;
}

// C (+)= A B as indexed_block_gemm, long sums in blocks of kStepsInBlock: a single chain would lose
// a digit more than the blocked products of a library do.
template <typename A, typename RowsA, typename StepsA, typename StepsB>
static inline void blocked_sums(int64_t m, int64_t n, int64_t k, const A* a, RowsA rows_a,
                                StepsA steps_a, const A* b, StepsB steps_b, A* c, int64_t ldc,
                                bool accumulate) {
  constexpr int64_t kStepsInBlock = 96;
  int64_t first = 0;
  do {
    const int64_t steps = std::min(kStepsInBlock, k - first);
    indexed_block_gemm<A>(m, n, steps, a, rows_a, steps_a.from(first), b, steps_b.from(first), c,
                          ldc, accumulate || first > 0);
    first += steps;
  } while (first < k);
}
