// Gradients of weight and bias.
//
// grad_weight is a matrix product over pixels: the left side is the input, transposed, through a
// GatherPlan's tables (rows are (channel, tap), steps are pixels); the right side is grad_output
// packed as [pixel][output channel], so that vectors run along output channels. An item of work is
// one group, one block of input channels and one share of the pixels; the shares are cut by shape
// alone and summed in order, so that the number of threads changes nothing.

template <typename T>
struct BackwardWeight {
  using A = Accumulator<T>;
  const ConvBackwardWeightParams& p;
  Correlation c;  // source = input, dest = grad_output
  GatherPlan plan;
  int64_t rows;            // (channel, tap) of a block of input channels; one more for the bias
  int64_t blocks, shares;  // of input channels, of pixels
  int64_t ld;              // output channels of a group in whole vectors

  int64_t channels(int64_t block) const {
    return p.maybe_grad_weight == nullptr ? 0 : std::min(plan.chunk, c.depth - block * plan.chunk);
  }

  // [pixel][ld] from the rows of grad_output.
  void pack_grad_output(const Unit& unit, int64_t group, const std::vector<int64_t>& dest,
                        A* packed) const {
    const int64_t stride = c.dest_stride.channel;
    const T* from = static_cast<const T*>(p.grad_output) + group * c.rows * stride;
    const int64_t num_pixels = dest.size();
    if (stride == 1) {
      for (int64_t i = 0; i < num_pixels; ++i) {
        pack_row(packed + i * ld, c.rows, from + dest[i], 1, 0, 1, int64_t{c.rows});
      }
      return;
    }
    for (int64_t i = 0; i < num_pixels; i += unit.columns) {
      pack_transposed(packed + i * ld, ld, c.rows, unit.columns, from + dest[i], stride,
                      c.dest_stride.space[2]);
    }
  }

  // Adds one share of the pixels to sums [rows + 1][ld], which begin at zero.
  void accumulate(int64_t group, int64_t block, int64_t share, A* tile, A* packed, A* sums) const {
    const int64_t units = plan.units.size(), taps = num_taps(c);
    std::vector<int64_t> source, dest;
    std::fill(sums, sums + (rows + 1) * ld, A(0));
    for (int64_t i = units * share / shares; i < units * (share + 1) / shares; ++i) {
      const Unit unit = plan.units.at(i);
      plan.list_pixels(c, unit, source, dest);
      pack_grad_output(unit, group, dest, packed);
      const int64_t num_pixels = dest.size();
      if (channels(block) > 0) {
        const A* from =
            gather_source<T>(c, plan, unit, group, block * plan.chunk, channels(block), tile);
        blocked_sums<A>(channels(block) * taps, c.rows, num_pixels, from,
                        Listed{plan.offsets.data()}, Listed{source.data()}, packed, Spaced{ld},
                        sums, ld, true);
      }
      if (block == 0 && p.maybe_grad_bias != nullptr)
        add_bias(num_pixels, packed, sums + rows * ld);
    }
  }

  // Pairwise: long sums lose less that way. Spoils `packed`.
  void add_bias(int64_t num_pixels, A* packed, A* sum) const {
    while (num_pixels > 1) {
      const int64_t half = ceil_div(num_pixels, 2);
      for (int64_t i = 0; i < (num_pixels - half) * ld; ++i) packed[i] += packed[half * ld + i];
      num_pixels = half;
    }
    for (int64_t k = 0; k < c.rows; ++k) sum[k] += packed[k];
  }

  // Sums of all shares, in order, into the results.
  void finish(int64_t group, int64_t block, const A* partials, int64_t share_stride) const {
    for (int64_t k = 0; k < c.rows; ++k) {
      const int64_t out_channel = group * c.rows + k;
      const auto total = [&](int64_t row) {
        A sum = 0;
        for (int64_t s = 0; s < shares; ++s) sum += partials[s * share_stride + row * ld + k];
        return store<T>(sum);
      };
      int64_t row = 0;
      for (int64_t d = 0; d < channels(block); ++d) {
        for (int64_t w = 0; w < c.taps[0]; ++w) {
          for (int64_t v = 0; v < c.taps[1]; ++v) {
            T* out = static_cast<T*>(p.maybe_grad_weight) +
                     out_channel * p.grad_weight_stride.outer +
                     (block * plan.chunk + d) * p.grad_weight_stride.channel +
                     w * p.grad_weight_stride.space[0] + v * p.grad_weight_stride.space[1];
            for (int64_t u = 0; u < c.taps[2]; ++u, ++row) {
              out[u * p.grad_weight_stride.space[2]] = total(row);
            }
          }
        }
      }
      if (block == 0 && p.maybe_grad_bias != nullptr) {
        static_cast<T*>(p.maybe_grad_bias)[out_channel] = total(rows);
      }
    }
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
  using A = Accumulator<T>;
  if (is_depthwise(p.geometry))
    return backward_weight_depthwise<T>(p, backward_weight_correlation(p));
  const Correlation c = backward_weight_correlation(p);
  const int64_t ld = padded<A>(c.rows);
  const int64_t max_chunk = std::max<int64_t>(1, 2 * kTileElements / (ld * num_taps(c)));
  BackwardWeight<T> work{p, c, GatherPlan::make(c, 256, std::is_same_v<T, A>, max_chunk)};
  work.ld = ld;
  const GatherPlan& plan = work.plan;
  work.blocks =
      p.maybe_grad_weight == nullptr ? 1 : std::max<int64_t>(1, ceil_div(c.depth, plan.chunk));
  work.rows =
      p.maybe_grad_weight == nullptr ? 0 : std::min<int64_t>(plan.chunk, c.depth) * num_taps(c);
  const int64_t items = c.groups * work.blocks;
  work.shares = std::max<int64_t>(1, std::min(16 / items, plan.units.size() / 4));

  const UnitShape& shape = plan.units.shape;
  const int64_t pixels = shape.images * shape.rows * shape.columns;
  const int64_t partial = (work.rows + 1) * ld;
  const Scratch<A> partials(work.shares * items * partial);
  parallel_for(0, items * work.shares, 1, [&](int64_t begin, int64_t end) {
    const Scratch<A> tile(plan.tile_size), packed(pixels * ld);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i % items;
      work.accumulate(item / work.blocks, item % work.blocks, i / items, tile.data(), packed.data(),
                      partials.data() + i * partial);
    }
  });
  parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      work.finish(item / work.blocks, item % work.blocks, partials.data() + item * partial,
                  items * partial);
    }
  });
}
