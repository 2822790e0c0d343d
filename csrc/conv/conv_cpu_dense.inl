// The engine for groups with enough output channels to fill vectors, in every layout: vectors run
// along output channels.
//
// A unit (some rows of an image, or some images) is a matrix product of pixels by channels, in
// panels of up to four vectors: the left side is the source, read through the offsets of Products,
// the right side is the weight. The sums of a panel stay in cache until they are finished and go
// out as the result lies, transposed where that is by planes.

template <typename T>
struct DenseCorrelation {
  using A = Accumulator<T>;
  using E = Operand<T>;
  const Correlation& c;
  StepOrder order;  // of elements: pairs of channels where the CPU multiplies those
  int64_t width, panels;
  UnitGrid units;
  SourcePlan source;
  std::vector<AxisRun> runs[3];
  Scratch<E> weights;

  explicit DenseCorrelation(const Correlation& c)
      : c(c),
        order(num_elements<E>(c.depth), c.taps, c.weight_stride.depth, c.weight_stride.tap[2]),
        width(panel_width(c.rows, kLanes<A>, kMostVectors)),
        panels(ceil_div(c.rows, width)),
        units(unit_shape(c.count, c.batch, target_pixels()), c.batch, c.count),
        source(c, units.shape, order.channels, reads_directly()),
        runs{axis_runs(c, 0), axis_runs(c, 1), axis_runs(c, 2)},
        weights(weight_elements<T, E>(c, order, width)) {}

  // A unit's source and the sums of a panel stay in a second-level cache; units enough for some
  // cores.
  int64_t target_pixels() const {
    const int64_t all = int64_t{c.batch} * c.count[0] * c.count[1] * c.count[2];
    const int64_t most =
        std::clamp<int64_t>(131072 / std::max<int64_t>(1, order.channels), 64, 512);
    return std::clamp<int64_t>(all * c.groups * panels / 16, 96, std::max<int64_t>(96, most));
  }

  // Where it costs the cache nothing: with few channels, or planes of a few lines. In between a
  // copy is worth its price: elements read together are kept from the same bank or set of the
  // cache.
  bool reads_directly() const {
    const int64_t stride = c.source_stride.channel;
    return std::is_same_v<T, A> && (c.depth <= 8 || (stride > 1 && stride <= 64));
  }

  // Sums that begin as the bias.
  void begin_panel(int64_t num_pixels, int64_t channel, int64_t count, A* sums) const {
    alignas(64) A bias[kMostVectors * kLanes<A>] = {};
    if (c.maybe_bias != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        bias[i] = load(static_cast<const T*>(c.maybe_bias)[channel + i]);
      }
    }
    std::copy(bias, bias + width, sums);
    for (int64_t done = 1; done < num_pixels; done *= 2) {
      std::copy(sums, sums + std::min(done, num_pixels - done) * width, sums + done * width);
    }
  }

  // The channels first .. first + count - 1 of a unit to where the result lies.
  void store_panel(const Unit& unit, int64_t first, int64_t count, const A* sums,
                   void* dest) const {
    const ConvStrides& s = c.dest_stride;
    // The rows of an image as one where they lie end to end.
    const bool dense = s.space[1] == unit.columns * s.space[2];
    const int64_t run = dense ? unit.rows * unit.columns : unit.columns;
    for (int64_t i = 0; i < unit.images; ++i) {
      for (int64_t y = 0; y < (dense ? 1 : unit.rows); ++y, sums += run * width) {
        T* to = static_cast<T*>(dest) + (unit.image + i) * s.outer + first * s.channel +
                unit.z * s.space[0] + (unit.y + y) * s.space[1] + unit.x * s.space[2];
        if (s.space[2] == 1 && s.channel != 1) {
          transpose(to, s.channel, sums, width, run, count, sums + run * width);
          continue;
        }
        for (int64_t p = 0; p < run; ++p) {
          store_row(to + p * s.space[2], s.channel, sums + p * width, count);
        }
      }
    }
  }

  // One panel of a unit.
  void run_panel(const Unit& unit, int64_t group, int64_t panel, const Products& products,
                 const E* from, A* sums) const {
    const int64_t row = panel * width, count = std::min(width, c.rows - row);
    const int64_t num_pixels = unit.images * unit.rows * unit.columns;
    const E* weight = weights.data() + (group * panels + panel) * order.size() * width;
    begin_panel(num_pixels, group * c.rows + row, count, sums);
    for (const Products::Product& p : products.list) {
      if (p.num_steps == 0) continue;
      blocked_sums<E>(p.num_pixels, count, p.num_steps, from,
                      Listed{products.pixel_source.data() + p.pixel},
                      Listed{products.step_source.data() + p.step}, weight,
                      Listed{products.step_row.data() + p.step}, sums,
                      Listed{products.pixel_row.data() + p.pixel}, true);
    }
    const int64_t channel = group * c.rows + row;
    if (c.maybe_pre != nullptr) store_panel(unit, channel, count, sums, c.maybe_pre);
    activate(c.activation, sums, num_pixels * width);
    store_panel(unit, channel, count, sums, c.dest);
  }

  void run() const {
    const UnitShape& shape = units.shape;
    const int64_t pixels = shape.images * shape.rows * shape.columns;
    const int64_t blocks = units.size() * c.groups;
    // Few units: share the panels out too.
    const int64_t parts = std::clamp<int64_t>(16 / std::max<int64_t>(1, blocks), 1, panels);
    const int64_t cost = pixels * (order.size() + 8) * ceil_div(c.rows, parts);
    const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(1, cost));
    parallel_for(0, blocks * parts, grain, [&](int64_t begin, int64_t end) {
      const Scratch<E> tile(source.tile_size);
      const Scratch<A> sums(pixels * width);
      Products products;
      for (int64_t index = begin; index < end; ++index) {
        const int64_t block = index / parts, part = index % parts;
        const int64_t group = block % c.groups;
        const Unit unit = units.at(block / c.groups);
        const SourceView view = source.view(c, unit);
        products.by_class(c, runs, unit, view, order, width);
        const E* from =
            read_source<T>(c, source, unit, view, group * c.depth, c.depth, tile.data());
        for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
          run_panel(unit, group, p, products, from, sums.data());
        }
      }
    });
  }
};

template <typename T>
static void correlate_dense(const Correlation& c) {
  DenseCorrelation<T>(c).run();
}
