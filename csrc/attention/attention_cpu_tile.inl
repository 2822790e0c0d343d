// The tile products of attention on the CPU. Part of attention_cpu.inl.

// Where a tile of the score matrix lies. Lanes are its queries where queries own, else its keys.
template <bool kOwnsQueries>
struct TilePlace {
  const Sequence& sequence;
  int32_t head, own_row, own_rows, other_row, other_rows;

  int32_t row(int32_t lane, int32_t j) const {
    return kOwnsQueries ? own_row + lane : other_row + j;
  }
  int32_t column(int32_t lane, int32_t j) const {
    return kOwnsQueries ? other_row + j : own_row + lane;
  }
};

// What of a tile its products are made of: blocks of rows of the other operand, each with the lanes
// that any of them sees. Where the band hides nothing that is one block, the tile; of 64 by 64 on a
// diagonal it is five eighths.
struct TileBlocks {
  struct Block {
    int32_t row, rows, lane, lanes;
  };
  static constexpr int32_t kRows = 16;

  const Block* begin() const { return blocks; }
  const Block* end() const { return blocks + count; }

  int32_t count;
  Block blocks[kOtherRows / kRows];
};

static inline TileBlocks whole_tile(int32_t other_rows, int32_t own_rows) {
  return {1, {{0, other_rows, 0, own_rows}}};
}

// The lanes of a tile that see any of its other rows first .. last, or are seen by them.
template <bool kOwnsQueries>
static Range lanes_seen(const Band& band, const TilePlace<kOwnsQueries>& tile, int32_t first,
                        int32_t last) {
  const int32_t other = tile.other_row;
  const Range seen = kOwnsQueries ? rows_seeing(tile.sequence, band, other + first, other + last)
                                  : keys_seen_by(tile.sequence, band, other + first, other + last);
  const int32_t begin = std::clamp(seen.begin - tile.own_row, 0, tile.own_rows);
  return {begin, std::clamp(seen.end - tile.own_row, begin, tile.own_rows)};
}

// Whether the band hides something of a tile of so many rows and lanes.
template <bool kOwnsQueries>
static bool band_cuts(const Band& band, const TilePlace<kOwnsQueries>& tile, int32_t other_rows,
                      int32_t own_rows) {
  const int32_t last = other_rows - 1, last_lane = own_rows - 1;
  // Of the tile's corners, those farthest from the diagonal on either side.
  return !is_visible(band, tile.row(last_lane, 0), tile.column(last_lane, 0)) ||
         !is_visible(band, tile.row(0, last), tile.column(0, last));
}

// Blocks begin with whole vectors of lanes. Whether to make them is asked of a full tile: how a
// row's sums are cut must not depend on how many rows follow it.
template <typename A, bool kOwnsQueries>
static TileBlocks seen_blocks(const Band& band, const TilePlace<kOwnsQueries>& tile) {
  if (!band_cuts(band, tile, kOtherRows, kOwnRows<A>)) {
    return whole_tile(tile.other_rows, tile.own_rows);
  }
  constexpr auto kLane = static_cast<int32_t>(kLanes<A>);
  TileBlocks result{};
  for (int32_t row = 0; row < tile.other_rows; row += TileBlocks::kRows) {
    const int32_t rows = std::min(TileBlocks::kRows, tile.other_rows - row);
    const Range lanes = lanes_seen(band, tile, row, row + rows - 1);
    if (lanes.begin == lanes.end) continue;
    const int32_t lane = lanes.begin / kLane * kLane;
    result.blocks[result.count++] = {row, rows, lane, lanes.end - lane};
  }
  return result;
}

// pairs[j][i] = other[j] . own[i], where own holds lanes, or what is added to them. Long rows are
// added up in parts, which loses fewer digits.
template <typename E>
static void pair_products(const TileRows<E>& other, const E* own, const TileBlocks& blocks,
                          int32_t columns, ProductSum<E>* pairs, bool adds = false) {
  constexpr int32_t kPart = 128;
  const int32_t elements = num_elements<E>(columns);
  for (const auto& [row, rows, lane, lanes] : blocks) {
    for (int32_t first = 0; first < elements; first += kPart) {
      block_gemm<E>(rows, lanes, std::min(kPart, elements - first),
                    other.data + row * other.row_stride + first, other.row_stride, 1,
                    own + first * kOwnRows<E> + lane, kOwnRows<E>, pairs + row * kOwnRows<E> + lane,
                    kOwnRows<E>, adds || first > 0);
    }
  }
}

// result[d][i] += sum_j values[j][d] * weights[j][i].
template <typename E>
static void accumulate(const TileRows<E>& values, const E* weights, const TileBlocks& blocks,
                       int32_t columns, ProductSum<E>* result) {
  for (const auto& [row, rows, lane, lanes] : blocks) {
    const int64_t first = row / kSteps<E>;
    block_gemm<E>(columns, lanes, num_elements<E>(rows), values.data + first * values.row_stride, 1,
                  values.row_stride, weights + first * kOwnRows<E> + lane, kOwnRows<E>,
                  result + lane, kOwnRows<E>, true);
  }
}

// result[j][d] += sum_i weights[j][i] * own[i][d].
template <typename E>
static void accumulate_rows(const TileRows<E>& weights, const TileRows<E>& own,
                            const TileBlocks& blocks, int32_t columns, ProductSum<E>* result) {
  for (const auto& [row, rows, lane, lanes] : blocks) {
    const int64_t first = lane / kSteps<E>;
    block_gemm<E>(rows, columns, num_elements<E>(lanes),
                  weights.data + row * weights.row_stride + first, weights.row_stride, 1,
                  own.data + first * own.row_stride, own.row_stride,
                  result + row * padded<E>(columns), padded<E>(columns), true);
  }
}

// row[d] = factor * from[d].
template <typename T, typename A>
static void store_row(const A* from, A factor, int32_t columns, T* row) {
#pragma omp simd
  for (int32_t d = 0; d < columns; ++d) row[d] = store<T>(from[d] * factor);
}

// result[i][d] = lanes[d * kOwnRows + i] * row_scale[i]; `buffer` holds a tile's rows.
template <typename T, typename A>
static void store_lanes(const A* lanes, const A* row_scale, int32_t rows, int32_t columns,
                        A* buffer, T* result, int64_t row_stride) {
  const int64_t stride = padded<A>(columns);
  transpose(lanes, kOwnRows<A>, columns, rows, buffer, stride);
  for (int32_t i = 0; i < rows; ++i) {
    store_row(buffer + i * stride, row_scale[i], columns, result + i * row_stride);
  }
}
