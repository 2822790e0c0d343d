// The engine for results whose pixels lie side by side (contiguous tensors): vectors run along
// pixels.
//
// A unit's source is packed into a padded tile, split by residue of the step, with a common pitch.
// Destination pixel (image, y, x) then has the flat index (image * tile_rows + y) * pitch + x, and
// tap u of any pixel p reads element p + offset[u]: the correlation is a matrix product whose left
// side is the weight and whose right side is the tile itself, row u of it beginning at offset[u].
// No copy per tap is made. The few flat indices between rows (pitch - columns) are computed and
// dropped. Where nothing is padded and the step is 1 the source serves as its own tile.

struct PlanarPlan {
  UnitGrid units;
  TapAxis y, x;
  int64_t tile_rows, pitch, plane;    // plane: elements of one slot of one channel
  int64_t planes, chunk, num_chunks;  // planes of a channel; channels in a tile
  int64_t flat, padded_flat;          // flat indices of a unit
  std::vector<int64_t> offsets;       // [chunk][tap] of the packed tile
  std::vector<int64_t> direct;        // of the source itself, over all channels; or empty

  template <typename A>
  static UnitShape shape(const Correlation& c) {
    // One row of weights (depthwise) has no reuse to wait for: whole planes. Else about ten stripes
    // of 48 columns, whose sums stay in cache beside the tile.
    return unit_shape(c.count, c.batch, c.rows == 1 ? 4096 : 480);
  }

  template <typename A>
  static PlanarPlan make(const Correlation& c, bool source_as_is) {
    PlanarPlan p{UnitGrid(shape<A>(c), c.batch, c.count), tap_axis(c, 1), tap_axis(c, 2)};
    const UnitShape& unit = p.units.shape;
    p.tile_rows = unit.rows + p.y.extra;
    p.pitch = unit.columns + p.x.extra;
    const bool direct = source_as_is && unit.images == 1 && reads_inside(c) && c.step[1] == 1 &&
                        c.step[2] == 1 && c.source_stride.space[2] == 1 &&
                        (p.tile_rows == 1 || c.source_stride.space[1] >= p.pitch);
    if (direct && p.tile_rows > 1) p.pitch = c.source_stride.space[1];
    p.plane = unit.images * p.tile_rows * p.pitch;
    p.planes = c.taps[0] * int64_t(p.y.first.size() * p.x.first.size());
    p.chunk = std::max<int64_t>(
        1, std::min<int64_t>(c.depth, kTileElements / std::max<int64_t>(1, p.planes * p.plane)));
    p.num_chunks = ceil_div(c.depth, p.chunk);
    p.flat = ((unit.images - 1) * p.tile_rows + unit.rows - 1) * p.pitch + unit.columns;
    p.padded_flat = padded<A>(p.flat);
    for (int64_t d = 0; d < (direct ? c.depth : p.chunk); ++d) p.list_channel(c, d, direct);
    return p;
  }

  void list_channel(const Correlation& c, int64_t d, bool is_direct) {
    for (int64_t w = 0; w < c.taps[0]; ++w) {
      for (int64_t v = 0; v < c.taps[1]; ++v) {
        for (int64_t u = 0; u < c.taps[2]; ++u) {
          const int64_t slots = y.first.size() * x.first.size();
          const int64_t slot = w * slots + y.slot[v] * x.first.size() + x.slot[u];
          const int64_t inside = y.shift[v] * pitch + x.shift[u];
          if (d < chunk) offsets.push_back((d * planes + slot) * plane + inside);
          if (!is_direct) continue;
          direct.push_back(d * c.source_stride.channel +
                           w * c.tap_step[0] * c.source_stride.space[0] + inside);
        }
      }
    }
  }
};

template <typename T>
static void pack_planar_tile(const Correlation& c, const PlanarPlan& plan, const Unit& unit,
                             int64_t group, int64_t first_channel, int64_t channels,
                             Accumulator<T>* tile) {
  const int64_t rows = unit.rows + plan.y.extra, columns = unit.columns + plan.x.extra;
  for (int64_t d = 0; d < channels; ++d) {
    const T* channel = static_cast<const T*>(c.source) +
                       (group * c.depth + first_channel + d) * c.source_stride.channel;
    for (int64_t w = 0; w < c.taps[0]; ++w) {
      const int64_t z = c.start[0] + c.step[0] * unit.z + c.tap_step[0] * w;
      const bool inside = z >= 0 && z < c.source_size[0];
      for (const int64_t first_y : plan.y.first) {
        for (const int64_t first_x : plan.x.first) {
          for (int64_t i = 0; i < unit.images; ++i) {
            const T* image = channel + (unit.image + i) * c.source_stride.outer +
                             (inside ? z : 0) * c.source_stride.space[0];
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t y = first_y + c.step[1] * (unit.y + r);
              const bool row_inside = inside && y >= 0 && y < c.source_size[1];
              pack_row(tile + (i * plan.tile_rows + r) * plan.pitch, columns,
                       image + (row_inside ? y : 0) * c.source_stride.space[1],
                       c.source_stride.space[2], first_x + c.step[2] * unit.x, c.step[2],
                       row_inside ? int64_t{c.source_size[2]} : 0);
            }
          }
          tile += plan.plane;
        }
      }
    }
  }
}

// Where the source of a unit begins if it can serve as its own tile, else nullptr: reading runs on
// to whole vectors, which has to stay inside the tensor.
template <typename T>
static const T* direct_tile(const Correlation& c, const PlanarPlan& plan, const Unit& unit,
                            int64_t group) {
  if (plan.direct.empty()) return nullptr;
  const int64_t first =
      unit.image * c.source_stride.outer + group * c.depth * c.source_stride.channel +
      (c.start[0] + c.step[0] * unit.z) * c.source_stride.space[0] +
      (plan.y.first[0] + unit.y) * c.source_stride.space[1] + plan.x.first[0] + unit.x;
  const int64_t highest = *std::max_element(plan.direct.begin(), plan.direct.end());
  if (first + highest + plan.padded_flat > source_end(c)) return nullptr;
  return static_cast<const T*>(c.source) + first;
}

template <typename A>
static inline void planar_product(int64_t m, int64_t k, const PlanarPlan& plan, const A* panel,
                                  int64_t width, const A* tile, const int64_t* offsets, A* sums,
                                  bool accumulate) {
  if (m > 1) {
    blocked_sums<A>(m, plan.flat, k, panel, Spaced{1}, Spaced{width}, tile, Listed{offsets}, sums,
                    Spaced{plan.padded_flat}, accumulate);
    return;
  }
  // One row has to hold more vectors in flight to hide the latency of its additions.
  int64_t column = 0;
  for (; plan.padded_flat - column >= 8 * kLanes<A>; column += 8 * kLanes<A>) {
    gemm_stripe<A, 8>(1, k, panel, Spaced{1}, Spaced{width}, tile + column, Listed{offsets},
                      sums + column, Spaced{plan.padded_flat}, accumulate);
  }
  if (column < plan.flat) {
    indexed_block_gemm<A>(1, plan.flat - column, k, panel, Spaced{1}, Spaced{width}, tile + column,
                          Listed{offsets}, sums + column, Spaced{plan.padded_flat}, accumulate);
  }
}

// Rows m .. m + rows - 1 of a unit, finished.
template <typename T>
static void finish_planar(const Correlation& c, const PlanarPlan& plan, const Unit& unit,
                          int64_t group, int64_t m, int64_t rows, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  for (int64_t r = 0; r < rows; ++r, sums += plan.padded_flat) {
    const int64_t channel = group * c.rows + m + r;
    if (c.maybe_bias != nullptr) {
      const A bias = load(static_cast<const T*>(c.maybe_bias)[channel]);
      for (int64_t i = 0; i < plan.padded_flat; ++i) sums[i] += bias;
    }
    finish_row<T>(c, sums, plan.padded_flat, [&](const auto& visit) {
      for (int64_t i = 0; i < unit.images; ++i) {
        for (int64_t y = 0; y < unit.rows; ++y) {
          visit((i * plan.tile_rows + y) * plan.pitch, unit.columns,
                (unit.image + i) * c.dest_stride.outer + channel * c.dest_stride.channel +
                    unit.z * c.dest_stride.space[0] + (unit.y + y) * c.dest_stride.space[1] +
                    unit.x * c.dest_stride.space[2],
                c.dest_stride.space[2]);
        }
      }
    });
  }
}

template <typename T>
static void correlate_planar(const Correlation& c) {
  using A = Accumulator<T>;
  const PlanarPlan plan = PlanarPlan::make<A>(c, std::is_same_v<T, A>);
  const int64_t k = c.depth * num_taps(c), width = std::min<int64_t>(8, c.rows);
  const int64_t panels = ceil_div(c.rows, width);
  const Scratch<A> weights = pack_weights<T>(c, StepOrder::by_channel(c.depth, c.taps), width);
  // Few units: share the rows out too, at the price of packing a tile more than once.
  const int64_t units = plan.units.size() * c.groups;
  const int64_t parts = std::max<int64_t>(1, std::min(panels, 8 / std::max<int64_t>(1, units)));
  const int64_t part = ceil_div(panels, parts);
  const int64_t cost = plan.flat * (ceil_div(k * c.rows, parts) + 8);
  const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(1, cost));

  parallel_for(0, units * parts, grain, [&](int64_t begin, int64_t end) {
    const Scratch<A> tile(plan.chunk * plan.planes * plan.plane + plan.padded_flat + 16);
    const bool one_chunk = plan.num_chunks <= 1;
    const Scratch<A> sums((one_chunk ? 1 : part) * width * plan.padded_flat);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t group = index / parts % c.groups;
      const Unit unit = plan.units.at(index / parts / c.groups);
      const int64_t first = index % parts * part, last = std::min(panels, first + part);
      const T* source = direct_tile<T>(c, plan, unit, group);
      const A* panel = weights.data() + (group * panels + first) * k * width;
      const auto rows_of = [&](int64_t p) { return std::min(width, c.rows - p * width); };
      if constexpr (std::is_same_v<T, A>) {
        if (source != nullptr) {
          for (int64_t p = first; p < last; ++p, panel += k * width) {
            planar_product<A>(rows_of(p), k, plan, panel, width, source, plan.direct.data(),
                              sums.data(), false);
            finish_planar<T>(c, plan, unit, group, p * width, rows_of(p), sums.data());
          }
          continue;
        }
      }
      // Depth in chunks whose tile stays in cache; the sums of all rows wait for the last one.
      for (int64_t d = 0; d < std::max<int64_t>(1, c.depth); d += plan.chunk) {
        const int64_t channels = std::min(plan.chunk, c.depth - d);
        pack_planar_tile<T>(c, plan, unit, group, d, channels, tile.data());
        for (int64_t p = first; p < last; ++p) {
          A* block = sums.data() + (one_chunk ? 0 : (p - first) * width * plan.padded_flat);
          planar_product<A>(rows_of(p), channels * num_taps(c), plan,
                            panel + ((p - first) * k + d * num_taps(c)) * width, width, tile.data(),
                            plan.offsets.data(), block, d > 0);
          if (d + plan.chunk < c.depth) continue;
          finish_planar<T>(c, plan, unit, group, p * width, rows_of(p), block);
        }
      }
    }
  });
}
