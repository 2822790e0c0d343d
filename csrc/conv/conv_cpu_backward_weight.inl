// Gradients of weight and bias.
//
// grad_weight is a matrix product over pixels: the left side is the input, transposed, through the
// offsets of Products (rows are (channel, tap), steps are pixels); the right side is grad_output,
// packed as [pixel][output channel], so that vectors run along output channels. An item of work is
// one group, one block of input channels, one panel of output channels and one share of the pixels;
// the shares are cut by shape alone and summed in order, so that the number of threads changes
// nothing.

template <typename T>
struct BackwardWeight {
  using A = Accumulator<T>;
  const ConvBackwardWeightParams& p;
  const Correlation& c;  // source = input, dest = grad_output
  int64_t width, panels;
  int64_t block, blocks;  // input channels in a block of them; how many
  UnitGrid units;
  std::vector<AxisRun> runs[3];
  int64_t items, shares;

  BackwardWeight(const ConvBackwardWeightParams& p, const Correlation& c)
      : p(p),
        c(c),
        width(panel_width(c.rows, kLanes<A>, kMostVectors)),
        panels(ceil_div(c.rows, width)),
        block(p.maybe_grad_weight == nullptr ? 0 : std::min<int64_t>(c.depth, 64)),
        blocks(block == 0 ? 1 : ceil_div(c.depth, block)),
        units(unit_shape(c.count, c.batch, 256), c.batch, c.count),
        runs{axis_runs(c, 0), axis_runs(c, 1), axis_runs(c, 2)},
        items(c.groups * blocks * panels),
        shares(std::clamp<int64_t>(16 / items, 1, std::max<int64_t>(1, units.size() / 4))) {}

  // One product of a group, block and panel.
  struct Item {
    int64_t group, first, channels, panel;
    StepOrder order;  // of the rows of its sums
  };
  Item item_at(int64_t index) const {
    const int64_t first = index / panels % blocks * block;
    const int64_t channels = std::min(block, c.depth - first);
    return {index / panels / blocks, first, channels, index % panels,
            StepOrder(channels, c.taps, c.weight_stride.depth, c.weight_stride.tap[2])};
  }
  // Rows of an item's sums: one for each (channel, tap) and one for the bias.
  int64_t item_size() const { return (block * num_taps(c) + 1) * width; }
  int64_t columns(const Item& item) const { return std::min(width, c.rows - item.panel * width); }

  // A unit of grad_output's panel as [pixel][width], zeros behind the last channel.
  void pack_grad_output(const Item& item, const Unit& unit, A* packed) const {
    const ConvStrides& s = c.dest_stride;
    const int64_t count = columns(item), channel = item.group * c.rows + item.panel * width;
    const T* const grad_output = static_cast<const T*>(p.grad_output);
    const T* const end = grad_output + dest_end(c);
    const bool dense = s.space[1] == unit.columns * s.space[2];
    const int64_t run = dense ? unit.rows * unit.columns : unit.columns;
    for (int64_t i = 0; i < unit.images; ++i) {
      for (int64_t y = 0; y < (dense ? 1 : unit.rows); ++y, packed += run * width) {
        const T* from = grad_output + (unit.image + i) * s.outer + channel * s.channel +
                        unit.z * s.space[0] + (unit.y + y) * s.space[1] + unit.x * s.space[2];
        const bool planar = s.space[2] == 1 && s.channel != 1;
        if (planar) transpose(packed, width, from, s.channel, count, run, end);
        for (int64_t x = 0; x < run && !(planar && count == width); ++x) {
          A* to = packed + x * width;
          if (!planar) pack_row(to, count, from + x * s.space[2], s.channel, 0, 1, count);
          std::fill(to + count, to + width, A(0));
        }
      }
    }
  }

  // Adds one share of the pixels to an item's sums, which begin at zero.
  void accumulate(const Item& item, int64_t share, const SourcePlan& source, A* tile, A* packed,
                  Products& products, A* sums) const {
    std::fill(sums, sums + item_size(), A(0));
    const bool with_bias = item.first == 0 && p.maybe_grad_bias != nullptr;
    const int64_t count = units.size();
    for (int64_t i = count * share / shares; i < count * (share + 1) / shares; ++i) {
      const Unit unit = units.at(i);
      pack_grad_output(item, unit, packed);
      if (item.channels > 0) {
        const SourceView view = source.view(c, unit);
        const A* from = read_source<T>(c, source, unit, view, item.group * c.depth + item.first,
                                       item.channels, tile);
        // A tap's channels fill the rows of a product where they are many; else all taps do.
        if (item.channels >= 8) {
          products.by_tap(c, unit, view, item.order, width);
        } else {
          products.by_class(c, runs, unit, view, item.order, width);
        }
        for (const Products::Product& q : products.list) {
          if (q.num_steps == 0) continue;
          blocked_sums<A>(q.num_steps, columns(item), q.num_pixels, from,
                          Listed{products.step_source.data() + q.step},
                          Listed{products.pixel_source.data() + q.pixel}, packed,
                          Listed{products.pixel_row.data() + q.pixel}, sums,
                          Listed{products.step_row.data() + q.step}, true);
        }
      }
      if (with_bias) add_bias(unit.images * unit.rows * unit.columns, packed, sums);
    }
  }

  // Pairwise: long sums lose less that way. Spoils `packed`.
  void add_bias(int64_t num_pixels, A* packed, A* sums) const {
    while (num_pixels > 1) {
      const int64_t half = ceil_div(num_pixels, 2);
      for (int64_t i = 0; i < (num_pixels - half) * width; ++i)
        packed[i] += packed[half * width + i];
      num_pixels = half;
    }
    A* sum = sums + item_size() - width;
    for (int64_t k = 0; k < width; ++k) sum[k] += packed[k];
  }

  // The sums of all shares, in order, into the results.
  void finish(const Item& item, A* sums) const {
    const int64_t size = item_size(), count = columns(item);
    for (int64_t s = 1; s < shares; ++s) {
      const A* other = sums + s * items * size;
      for (int64_t i = 0; i < size; ++i) sums[i] += other[i];
    }
    const int64_t channel = item.group * c.rows + item.panel * width;
    if (item.channels > 0) {
      T* to = static_cast<T*>(p.maybe_grad_weight) + channel * p.grad_weight_stride.outer +
              item.first * p.grad_weight_stride.channel;
      // Dense in the order of the rows but where a block's channels end.
      const int64_t run = item.order.tap_major ? item.channels : item.order.size();
      for (int64_t row = 0; row < item.order.size(); row += run) {
        const int64_t tap = item.order.tap_major ? row / run : 0;
        transpose(to + tap * c.weight_stride.tap[2], p.grad_weight_stride.outer, sums + row * width,
                  width, run, count, sums + size);
      }
    }
    if (item.first == 0 && p.maybe_grad_bias != nullptr) {
      store_row(static_cast<T*>(p.maybe_grad_bias) + channel, 1, sums + size - width, count);
    }
  }

  void run() const {
    const bool direct = std::is_same_v<T, A>;
    const SourcePlan source(c, units.shape, std::max<int64_t>(1, block), direct);
    const int64_t pixels = units.shape.images * units.shape.rows * units.shape.columns;
    const Scratch<A> sums(shares * items * item_size());
    parallel_for(0, items * shares, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> tile(source.tile_size), packed(pixels * width);
      Products products;
      for (int64_t i = begin; i < end; ++i) {
        accumulate(item_at(i % items), i / items, source, tile.data(), packed.data(), products,
                   sums.data() + i * item_size());
      }
    });
    parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(item_at(i), sums.data() + i * item_size());
    });
  }
};

// The forward pass's correlation, with grad_output in the place of the output.
inline Correlation backward_weight_correlation(const ConvBackwardWeightParams& p) {
  ConvForwardParams forward{};
  forward.input = p.input;
  forward.input_stride = p.input_stride;
  forward.weight_stride = p.grad_weight_stride;
  forward.output_stride = p.grad_output_stride;
  forward.geometry = p.geometry;
  forward.dtype = p.dtype;
  return forward_correlation(forward);
}

template <typename T>
static void backward_weight(const ConvBackwardWeightParams& p) {
  const Correlation c = backward_weight_correlation(p);
  if (c.depth == 1 && c.rows < kLanes<Accumulator<T>>) return backward_weight_depthwise<T>(p, c);
  BackwardWeight<T>(p, c).run();
}
