// Gradients of weight and bias: sums over all pixels, in two passes of fixed order. The first
// leaves one sum for each of `splits` shares of the pixels, the second adds the shares up.
//
// conv_backward_weight_kernel: an implicit matrix product, grad_output [channel, pixel] by the
// gathered input [pixel, (channel, tap)]. Grid: one block per 64 output channels of a group by 64
// (channel, tap) by share, in one axis. 256 threads, each with 4 x 4 sums in registers.
//
// conv_strand_sums_kernel: the depthwise weight and the bias, which are plain sums per channel: a
// block's threads walk the pixels in strands and add their sums up in a tree.
#pragma once

#include "conv/conv_gather.cuh"

namespace fused {

constexpr int kWeightTile = 64;

template <typename A>
struct WeightTiles {
  A grad[kStepDepth][kWeightTile + kPad];
  A input[kStepDepth][kWeightTile + kPad];
  PixelEntry pixels[kStepDepth];
  TapEntry taps[kWeightTile];
};

// Where share `split` of `count` pixels begins.
__device__ __forceinline__ int64_t share_begin(int64_t count, int64_t split, int64_t splits) {
  return count / splits * split + count % splits * split / splits;
}

// Where a block works: a tile of output channels by (channel, tap), over a share of the pixels.
struct WeightPlace {
  int32_t group, rows, first_column;  // rows: how many output channels there are in the tile
  int64_t first_channel;              // of all groups
  int64_t split, begin, end;
};

template <int kTileRows, int kTileColumns>
__device__ __forceinline__ WeightPlace weight_place(const Correlation& c, int32_t columns,
                                                    int64_t num_pixels, int32_t splits) {
  const int32_t row_tiles = (c.rows + kTileRows - 1) / kTileRows;
  const int32_t column_tiles = (columns + kTileColumns - 1) / kTileColumns;
  WeightPlace place;
  int64_t index = blockIdx.x;
  const int32_t first_row = static_cast<int32_t>(index % row_tiles) * kTileRows;
  index /= row_tiles;
  place.first_column = static_cast<int32_t>(index % column_tiles) * kTileColumns;
  index /= column_tiles;
  place.group = static_cast<int32_t>(index % c.groups);
  place.rows = min(kTileRows, c.rows - first_row);
  place.first_channel = int64_t{place.group} * c.rows + first_row;
  place.split = index / c.groups;
  place.begin = share_begin(num_pixels, place.split, splits);
  place.end = share_begin(num_pixels, place.split + 1, splits);
  return place;
}

// Element (channel of a group, tap entry) of a partial gradient [K][C / G][taps], contiguous.
template <bool kChannelsLast>
__device__ __forceinline__ int64_t partial_index(int32_t index, int32_t depth, int32_t taps) {
  return kChannelsLast ? int64_t{index % depth} * taps + index / depth : index;
}

template <typename T, bool kChannelsLast>
struct WeightLoader {
  using A = Accumulator<T>;
  static constexpr int kElements = kWeightTile * kStepDepth / kConvThreads;
  T grads[kElements], inputs[kElements];

  // Lanes along pixels, or along channels.
  static __device__ __forceinline__ int step(int i) {
    return kChannelsLast ? threadIdx.x / kWeightTile + i * (kConvThreads / kWeightTile)
                         : threadIdx.x % kStepDepth;
  }
  static __device__ __forceinline__ int column(int i) {
    return kChannelsLast ? threadIdx.x % kWeightTile
                         : threadIdx.x / kStepDepth + i * (kConvThreads / kStepDepth);
  }

  __device__ __forceinline__ void fetch(const Correlation& c, const WeightTiles<A>& tiles,
                                        const T* grad, const T* input, int32_t rows) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const PixelEntry& pixel = tiles.pixels[step(i)];
      const TapEntry& tap = tiles.taps[column(i)];
      grads[i] = pixel.dest >= 0 && column(i) < rows
                     ? grad[pixel.dest + column(i) * c.dest_stride.channel]
                     : T{};
      inputs[i] = is_inside(c, pixel, tap) ? input[pixel.source + tap.source] : T{};
    }
  }

  __device__ __forceinline__ void put(WeightTiles<A>& tiles) const {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      tiles.grad[step(i)][column(i)] = load(grads[i]);
      tiles.input[step(i)][column(i)] = load(inputs[i]);
    }
  }
};

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kConvThreads, sizeof(Accumulator<T>) == 8 ? 1 : 2)
    conv_backward_weight_kernel(const Correlation c, const int64_t num_pixels, const int32_t splits,
                                Accumulator<T>* partials) {
  using A = Accumulator<T>;
  WeightTiles<A>& tiles = *shared_memory<WeightTiles<A>>();
  const int32_t taps = c.taps[0] * c.taps[1] * c.taps[2], columns = c.depth * taps;
  const auto place = weight_place<kWeightTile, kWeightTile>(c, columns, num_pixels, splits);
  const int64_t begin = place.begin, end = place.end;
  const int32_t rows = place.rows, first_column = place.first_column;
  const T* grad = static_cast<const T*>(c.dest) + place.first_channel * c.dest_stride.channel;
  const T* input = group_source<T>(c, place.group);
  const int thread = threadIdx.x;

  if (thread < kWeightTile) {
    tiles.taps[thread] = decode_tap<kChannelsLast>(c, first_column + thread, taps);
  }
  if (thread < kStepDepth) tiles.pixels[thread] = decode_pixel(c, begin + thread, end);
  __syncthreads();

  // Lanes run along (channel, tap).
  const int my_column = thread % 16 * 4, my_row = thread / 16 * 4;
  A sums[4][4] = {}, totals[4][4] = {};
  WeightLoader<T, kChannelsLast> loader;
  loader.fetch(c, tiles, grad, input, rows);
  for (int64_t pixel = begin; pixel < end; pixel += kStepDepth) {
    __syncthreads();  // the last products and the last fetch have read the tiles
    loader.put(tiles);
    if (thread < kStepDepth) {
      tiles.pixels[thread] = decode_pixel(c, pixel + kStepDepth + thread, end);
    }
    __syncthreads();
    if (pixel + kStepDepth < end) loader.fetch(c, tiles, grad, input, rows);
    multiply_tiles(tiles.grad, tiles.input, my_row, my_column, sums);
    if ((pixel - begin) / kStepDepth % kStepsInBlock == kStepsInBlock - 1) end_block(sums, totals);
  }
  end_block(sums, totals);

  partials += (place.split * c.groups * c.rows + place.first_channel) * columns;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t column = first_column + my_column + j;
      if (my_row + i >= rows || column >= columns) continue;
      partials[int64_t{my_row + i} * columns +
               partial_index<kChannelsLast>(column, c.depth, taps)] = totals[i][j];
    }
  }
}

// What a channel's pixels are summed with: the input under kTaps taps, or nothing (the bias).
constexpr int kTapsAtOnce = 8;

// Channels in the lanes of a block, the other threads being strands of pixels; or one channel.
template <bool kChannelsLast>
constexpr int kStrandChannels = kChannelsLast ? 32 : 1;

// Sums `value` over the strands of a block; thread (strand 0, channel) has the result.
template <typename A, int kChannels>
__device__ __forceinline__ A sum_strands(A value, A* shared) {
  const int thread = threadIdx.x, strand = thread / kChannels;
  __syncthreads();  // the last sum has been read
  shared[thread] = value;
  for (int half = kConvThreads / kChannels / 2; half > 0; half /= 2) {
    __syncthreads();
    if (strand < half) shared[thread] += shared[thread + half * kChannels];
  }
  return shared[thread];
}

// Grid: channel tiles by shares, in one axis. partials [splits][K][taps], taps = 1 for the bias.
template <typename T, bool kChannelsLast, bool kBias>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv_strand_sums_kernel(const Correlation c, const int64_t num_pixels, const int32_t splits,
                            Accumulator<T>* partials) {
  using A = Accumulator<T>;
  constexpr int kChannels = kStrandChannels<kChannelsLast>;
  constexpr int kStrands = kConvThreads / kChannels;
  A* shared = shared_memory<A>();
  const int64_t channels = int64_t{c.groups} * c.rows;
  const int64_t tiles = (channels + kChannels - 1) / kChannels;
  const int64_t channel = blockIdx.x % tiles * kChannels + threadIdx.x % kChannels;
  const int64_t split = blockIdx.x / tiles;
  const int64_t begin = share_begin(num_pixels, split, splits);
  const int64_t end = share_begin(num_pixels, split + 1, splits);
  const bool valid = channel < channels;
  const T* grad = static_cast<const T*>(c.dest) + (valid ? channel : 0) * c.dest_stride.channel;
  const T* input =
      static_cast<const T*>(c.source) + (valid ? channel / c.rows : 0) * c.source_stride.channel;
  const int32_t taps = kBias ? 1 : c.taps[0] * c.taps[1] * c.taps[2];

  for (int32_t first_tap = 0; first_tap < taps; first_tap += kTapsAtOnce) {
    constexpr int kSums = kBias ? 1 : kTapsAtOnce;
    A sums[kSums] = {};
    for (int64_t i = begin + threadIdx.x / kChannels; valid && i < end; i += kStrands) {
      const PixelEntry pixel = decode_pixel(c, i, end);
      const A value = load(grad[pixel.dest]);
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        if constexpr (kBias) {
          sums[j] += value;
        } else {
          const TapEntry tap = decode_tap<false>(c, first_tap + j, taps);
          if (is_inside(c, pixel, tap)) sums[j] += value * load(input[pixel.source + tap.source]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      const A sum = sum_strands<A, kChannels>(sums[j], shared);
      if (valid && threadIdx.x < kChannels && first_tap + j < taps) {
        partials[(split * channels + channel) * taps + first_tap + j] = sum;
      }
    }
  }
}

// Adds the shares up, in order. out's element (k, c, tap) of [K][C / G][taps]; one thread each.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    conv_sum_shares_kernel(const Accumulator<T>* partials, const int32_t splits,
                           const int64_t count, T* out, const ConvStrides stride,
                           const int32_t depth, const int32_t taps_y, const int32_t taps_x,
                           const int32_t taps) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= count) return;
  Accumulator<T> sum = 0;
  for (int32_t s = 0; s < splits; ++s) sum += partials[s * count + index];
  const int32_t tap = static_cast<int32_t>(index % taps);
  const int64_t channel = index / taps % depth, k = index / taps / depth;
  out[k * stride.outer + channel * stride.channel + tap / taps_x / taps_y * stride.space[0] +
      tap / taps_x % taps_y * stride.space[1] + tap % taps_x * stride.space[2]] = store<T>(sum);
}

}  // namespace fused
