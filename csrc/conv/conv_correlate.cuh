// Correlation (the forward pass and the gradient of the input, see correlation.h) as an implicit
// matrix product: no tensor of patches is made, a tile of it is gathered into shared memory at
// every step.
//
// Grid: one block per kTileRows destination channels of one group by kTilePixels destination
// pixels, rows fastest, in one axis. 256 threads, each with 4 x 4 sums in registers. The lanes of a
// warp run along what lies side by side in memory: pixels of contiguous tensors, channels of
// channels-last ones. While a step's products are summed, the next step's elements are on their
// way.
#pragma once

#include "conv/conv_activation.cuh"
#include "conv/conv_gather.cuh"

namespace fused {

// Where a block works: a tile of the destination's channels and of its pixels.
struct CorrelatePlace {
  int32_t group, first_row, rows;  // rows of the group, and how many of them there are in the tile
  int64_t first_channel;           // of all groups
  int64_t first_pixel;
};

template <int kTileRows, int kTilePixels>
__device__ __forceinline__ CorrelatePlace correlate_place(const Correlation& c) {
  const int32_t row_tiles = (c.rows + kTileRows - 1) / kTileRows;
  CorrelatePlace place;
  place.first_row = static_cast<int32_t>(blockIdx.x % row_tiles) * kTileRows;
  place.group = static_cast<int32_t>(blockIdx.x / row_tiles % c.groups);
  place.rows = min(kTileRows, c.rows - place.first_row);
  place.first_channel = int64_t{place.group} * c.rows + place.first_row;
  place.first_pixel = int64_t{blockIdx.x} / row_tiles / c.groups * kTilePixels;
  return place;
}

template <int kTileRows>
int64_t correlate_blocks(const Correlation& c, int64_t num_pixels, int tile_pixels) {
  return ceil_div(c.rows, kTileRows) * c.groups * ceil_div(num_pixels, tile_pixels);
}

template <typename A, int kTileRows>
struct CorrelateTiles {
  static constexpr int kTilePixels = kConvThreads * 16 / kTileRows;
  A weight[kStepDepth][kTileRows + kPad];
  A source[kStepDepth][kTilePixels + kPad];
  PixelEntry pixels[kTilePixels];
  TapEntry taps[2][kStepDepth];  // of steps by turns
};

// The elements that a thread carries from global memory into the tiles.
template <typename T, int kTileRows, bool kChannelsLast, bool kVector>
struct CorrelateLoader {
  using A = Accumulator<T>;
  using Tiles = CorrelateTiles<A, kTileRows>;
  static constexpr int kTilePixels = Tiles::kTilePixels;
  static constexpr int kWeights = kTileRows * kStepDepth / kConvThreads;
  static constexpr int kSources = kTilePixels * kStepDepth / kConvThreads;
  static_assert(kTileRows % (kConvThreads / kStepDepth) == 0);
  static_assert(!kVector || (kChannelsLast && kSources % 4 == 0));

  T weights[kWeights], sources[kSources];

  // Place of a thread's i-th weight, and of its i-th source element, in a tile.
  static __device__ __forceinline__ int weight_step(int) { return threadIdx.x % kStepDepth; }
  static __device__ __forceinline__ int weight_row(int i) {
    return threadIdx.x / kStepDepth + i * (kConvThreads / kStepDepth);
  }
  static __device__ __forceinline__ int source_step(int i) {
    if (kVector) return threadIdx.x % 4 * 4 + i % 4;
    return kChannelsLast ? threadIdx.x % kStepDepth : threadIdx.x / 64 % 4 + i % 4 * 4;
  }
  static __device__ __forceinline__ int source_pixel(int i) {
    if (kVector) return threadIdx.x / 4 + i / 4 * 64;
    return kChannelsLast ? threadIdx.x / kStepDepth + i * (kConvThreads / kStepDepth)
                         : threadIdx.x % 64 + i / 4 * 64;
  }

  __device__ __forceinline__ void fetch(const Correlation& c, const Tiles& tiles, int32_t step,
                                        const T* weight, const T* source, int32_t rows) {
    const auto& taps = tiles.taps[step % 2];
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int64_t offset = taps[weight_step(i)].weight;
      const int row = weight_row(i);
      weights[i] = offset >= 0 && row < rows ? weight[row * c.weight_stride.row + offset] : T{};
    }
    if constexpr (kVector) {
#pragma unroll
      for (int i = 0; i < kSources; i += 4) {
        // Four channels of one tap: inside together or not at all.
        const PixelEntry& pixel = tiles.pixels[source_pixel(i)];
        const TapEntry& tap = taps[source_step(i)];
        StoredFour<T> four{};
        if (is_inside(c, pixel, tap)) {
          four = *reinterpret_cast<const StoredFour<T>*>(source + pixel.source + tap.source);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sources[i + j] = four.element[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSources; ++i) {
        const PixelEntry& pixel = tiles.pixels[source_pixel(i)];
        const TapEntry& tap = taps[source_step(i)];
        sources[i] = is_inside(c, pixel, tap) ? source[pixel.source + tap.source] : T{};
      }
    }
  }

  __device__ __forceinline__ void put(Tiles& tiles) const {
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      tiles.weight[weight_step(i)][weight_row(i)] = load(weights[i]);
    }
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      tiles.source[source_step(i)][source_pixel(i)] = load(sources[i]);
    }
  }
};

// Four results whose offsets are given, as one access where they are neighbours and aligned.
template <typename T, typename A>
__device__ __forceinline__ void store_four(T* out, const int64_t (&offset)[4], int count,
                                           const A (&value)[4]) {
  if (count == 4 && offset[1] == offset[0] + 1 && offset[2] == offset[0] + 2 &&
      offset[3] == offset[0] + 3 &&
      reinterpret_cast<uintptr_t>(out + offset[0]) % sizeof(StoredFour<T>) == 0) {
    StoredFour<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.element[i] = store<T>(value[i]);
    *reinterpret_cast<StoredFour<T>*>(out + offset[0]) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) out[offset[i]] = store<T>(value[i]);
  }
}

// Bias, activation and the way out for 4 rows by 4 pixels; the inner four lie side by side.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ void finish_sums(const Correlation& c, const PixelEntry* pixels,
                                            int64_t first_channel, int32_t rows,
                                            Accumulator<T> (&sums)[4][4]) {
  using A = Accumulator<T>;
#pragma unroll
  for (int outer = 0; outer < 4; ++outer) {
    int64_t offset[4];
    A value[4];
    int count = 0;
#pragma unroll
    for (int inner = 0; inner < 4; ++inner) {
      const int row = kChannelsLast ? inner : outer, pixel = kChannelsLast ? outer : inner;
      offset[inner] = 0;
      value[inner] = sums[row][pixel];
      if (row >= rows || pixels[pixel].dest < 0) continue;
      ++count;
      offset[inner] = pixels[pixel].dest + (first_channel + row) * c.dest_stride.channel;
      if (c.maybe_bias != nullptr) {
        value[inner] += load(static_cast<const T*>(c.maybe_bias)[first_channel + row]);
      }
    }
    if (c.maybe_pre != nullptr) store_four(static_cast<T*>(c.maybe_pre), offset, count, value);
#pragma unroll
    for (int inner = 0; inner < 4; ++inner) value[inner] = activate(c.activation, value[inner]);
    store_four(static_cast<T*>(c.dest), offset, count, value);
  }
}

template <typename T, int kTileRows, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kConvThreads, sizeof(Accumulator<T>) == 8 ? 1 : 2)
    conv_correlate_kernel(const Correlation c, const int64_t num_pixels) {
  using A = Accumulator<T>;
  using Loader = CorrelateLoader<T, kTileRows, kChannelsLast, kVector>;
  using Tiles = typename Loader::Tiles;
  constexpr int kTilePixels = Tiles::kTilePixels;
  Tiles& tiles = *shared_memory<Tiles>();

  const auto place = correlate_place<kTileRows, kTilePixels>(c);
  const int32_t rows = place.rows;
  const int32_t taps = c.taps[0] * c.taps[1] * c.taps[2];
  const int32_t steps = (c.depth * taps + kStepDepth - 1) / kStepDepth;
  const T* weight = static_cast<const T*>(c.weight) + place.group * c.weight_stride.group +
                    place.first_row * c.weight_stride.row;
  const T* source = group_source<T>(c, place.group);
  const int thread = threadIdx.x;

  for (int i = thread; i < kTilePixels; i += kConvThreads) {
    tiles.pixels[i] = decode_pixel(c, place.first_pixel + i, num_pixels);
  }
  if (thread < 2 * kStepDepth) {
    tiles.taps[thread / kStepDepth][thread % kStepDepth] =
        decode_tap<kChannelsLast>(c, thread, taps);
  }
  __syncthreads();

  // Lanes run along pixels or along rows: whichever the destination has side by side.
  constexpr int kLanes = kChannelsLast ? kTileRows / 4 : kTilePixels / 4;
  const int lane = thread % kLanes * 4, other = thread / kLanes * 4;
  const int my_row = kChannelsLast ? lane : other, my_pixel = kChannelsLast ? other : lane;
  A sums[4][4] = {}, totals[4][4] = {};
  Loader loader;
  if (steps > 0) loader.fetch(c, tiles, 0, weight, source, rows);
  for (int32_t step = 0; step < steps; ++step) {
    __syncthreads();  // the last products and the last fetch have read the tiles
    loader.put(tiles);
    __syncthreads();
    // Divisions, for which nobody waits: those taps are fetched two barriers later.
    if (thread < kStepDepth) {
      tiles.taps[step % 2][thread] =
          decode_tap<kChannelsLast>(c, (step + 2) * kStepDepth + thread, taps);
    }
    if (step + 1 < steps) loader.fetch(c, tiles, step + 1, weight, source, rows);
    multiply_tiles(tiles.weight, tiles.source, my_row, my_pixel, sums);
    if (step % kStepsInBlock == kStepsInBlock - 1) end_block(sums, totals);
  }
  end_block(sums, totals);
  finish_sums<T, kChannelsLast>(c, tiles.pixels + my_pixel, place.first_channel + my_row,
                                rows - my_row, totals);
}

}  // namespace fused
