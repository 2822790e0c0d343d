// The gradient of the weight on tensor cores: shares of grad_output [channel, pixel] by the
// gathered input [pixel, (channel, tap)], as conv_backward_weight_kernel leaves them for
// conv_sum_shares_kernel.
//
// Grid: one block per kRows output channels of a group by kColumns (channel, tap) by share, in one
// axis. 256 threads, each warp with 32 x 32 sums. Where kVector says that both operands have eight
// channels side by side, pixels are the rows of the tiles, copied two steps ahead, and ldmatrix
// turns them. Else they are gathered into rows of depth, in registers while the step before is
// multiplied.
#pragma once

#include "conv/conv_backward_weight.cuh"
#include "conv/conv_mma_tile.cuh"

namespace fused {

struct WeightMmaTile {
  static constexpr int kRows = 64, kColumns = 128;
  static constexpr int kM = 2, kN = 4;  // of a warp, of which there are two by four
};

template <typename T, bool kVector>
struct WeightMmaMemory {
  static constexpr int kStages = kVector ? 3 : 2;
  static constexpr int kColumnsOfTap = kVector ? kChunk<T> : 1;  // columns that one entry serves
  struct Stage {
    T grad[WeightMmaTile::kRows * kMmaDepth];
    T input[WeightMmaTile::kColumns * kMmaDepth];
  } stages[kStages];
  PixelEntry pixels[kStages][kMmaDepth];  // of steps by turns
  TapEntry taps[WeightMmaTile::kColumns / kColumnsOfTap];
  PixelPlace turn;  // what a warp's pixels go on by until its next turn, as a place
};

// Goes on by as many pixels as `by` is the place of, each axis carrying into the one before.
__device__ __forceinline__ void move_on(const Correlation& c, const PixelPlace& by,
                                        PixelPlace& place) {
  int32_t carry = 0;
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    place.at[axis] += by.at[axis] + carry;
    carry = place.at[axis] >= c.count[axis];
    if (carry) place.at[axis] -= c.count[axis];
  }
  place.image += by.image + carry;
}

template <typename T, bool kChannelsLast, bool kVector>
__device__ __forceinline__ void weight_share_on_tensor_cores(const Correlation& c,
                                                             int64_t num_pixels, int32_t splits,
                                                             float* partials) {
  using Tile = WeightMmaTile;
  using Memory = WeightMmaMemory<T, kVector>;
  constexpr int kStages = Memory::kStages;
  Memory& memory = *shared_memory<Memory>();
  const int32_t taps = c.taps[0] * c.taps[1] * c.taps[2], columns = c.depth * taps;
  const auto place = weight_place<Tile::kRows, Tile::kColumns>(c, columns, num_pixels, splits);
  const T* grad = static_cast<const T*>(c.dest) + place.first_channel * c.dest_stride.channel;
  const T* input = group_source<T>(c, place.group);
  const int64_t count = place.end - place.begin;
  const int32_t steps = static_cast<int32_t>((count + kMmaDepth - 1) / kMmaDepth);
  const int thread = threadIdx.x;

  // The warps keep the pixels of a step by turns, a lane one of them.
  static_assert(kMmaDepth == kWarpSize);
  PixelPlace pixel = pixel_place(c, place.begin + thread);
  const auto place_pixels = [&](int32_t step) {
    if (warp_index() != step % kConvWarps) return;
    const int lane = thread % kWarpSize;
    const bool exists = int64_t{step} * kMmaDepth + lane < count;
    memory.pixels[step % kStages][lane] = pixel_entry(c, pixel, exists);
    move_on(c, memory.turn, pixel);
  };
  const auto begin_copies = [&](int32_t step) {
    auto& stage = memory.stages[step % kStages];
    const auto& pixels = memory.pixels[step % kStages];
    constexpr int kGradChunks = Tile::kRows / kChunk<T>, kInputChunks = Tile::kColumns / kChunk<T>;
    for_each_share<kMmaDepth * kGradChunks>([&](unsigned i) {
      const int depth = i / kGradChunks, chunk = i % kGradChunks;
      const int64_t dest = pixels[depth].dest;
      const bool inside = dest >= 0 && chunk * kChunk<T> < place.rows;
      ptx::cp_async_16(stage.grad + chunk_offset<T, Tile::kRows>(depth, chunk),
                       inside ? grad + dest + chunk * kChunk<T> : grad, inside ? 16 : 0);
    });
    for_each_share<kMmaDepth * kInputChunks>([&](unsigned i) {
      const int depth = i / kInputChunks, chunk = i % kInputChunks;
      const PixelEntry& from = pixels[depth];
      const TapEntry& tap = memory.taps[chunk];
      const bool inside = is_inside(c, from, tap);
      ptx::cp_async_16(stage.input + chunk_offset<T, Tile::kColumns>(depth, chunk),
                       inside ? input + from.source + tap.source : input, inside ? 16 : 0);
    });
  };
  ChunkCarrier<T, Tile::kRows, kChannelsLast> grads;
  ChunkCarrier<T, Tile::kColumns, kChannelsLast> inputs;
  const auto gather = [&](int32_t step) {
    const auto& pixels = memory.pixels[step % kStages];
    grads.fetch([&](int row, int depth) {
      const int64_t dest = pixels[depth].dest;
      return dest >= 0 && row < place.rows ? grad[dest + row * c.dest_stride.channel] : T{};
    });
    inputs.fetch([&](int row, int depth) {
      const PixelEntry& from = pixels[depth];
      const TapEntry& tap = memory.taps[row];
      return is_inside(c, from, tap) ? input[from.source + tap.source] : T{};
    });
  };
  const auto put = [&](int32_t step) {
    grads.put(memory.stages[step % kStages].grad);
    inputs.put(memory.stages[step % kStages].input);
  };

  if (thread == 0) memory.turn = pixel_place(c, kConvWarps * kMmaDepth);
  for (int i = thread; i < Tile::kColumns / Memory::kColumnsOfTap; i += kConvThreads) {
    memory.taps[i] =
        decode_tap<kChannelsLast>(c, place.first_column + i * Memory::kColumnsOfTap, taps);
  }
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < kStages; ++step) place_pixels(step);
  __syncthreads();
  if constexpr (kVector) {
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) begin_copies(step);
      ptx::cp_async_commit();
    }
  } else {
    gather(0);
    put(0);
  }

  const int warp_row = warp_index() % 2 * 16 * Tile::kM;
  const int warp_column = warp_index() / 2 * 8 * Tile::kN;
  float sums[Tile::kM][Tile::kN][4] = {};
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    const auto& stage = memory.stages[step % kStages];
    if constexpr (kVector) ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the step is there for all, and all are done with the one before
    if constexpr (kVector) {
      if (step + kStages - 1 < steps) begin_copies(step + kStages - 1);
      ptx::cp_async_commit();  // an empty group too, so that they can be counted
      add_column_products<Tile::kRows, Tile::kColumns>(stage.grad, warp_row, stage.input,
                                                       warp_column, sums);
      place_pixels(step + kStages);
    } else {
      gather(step + 1);  // nothing behind the last: its pixels do not exist
      add_row_products<kMmaDepth>(stage.grad, warp_row, stage.input + warp_column * kMmaDepth,
                                  sums);
      put(step + 1);
      place_pixels(step + kStages);
    }
  }

  partials += (place.split * c.groups * c.rows + place.first_channel) * columns;
  for_each_element<Tile::kM, Tile::kN>([&](int m, int n, int i) {
    const int row = warp_row + row_of_element(m, i);
    const int32_t column = place.first_column + warp_column + column_of_element(n, i);
    if (row >= place.rows || column >= columns) return;
    partials[int64_t{row} * columns + partial_index<kChannelsLast>(column, c.depth, taps)] =
        sums[m][n][i];
  });
}

template <typename T, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kConvThreads, kVector ? 2 : 1)
    conv_mma_backward_weight_kernel(const Correlation c, const int64_t num_pixels,
                                    const int32_t splits, float* partials) {
  if constexpr (ptx::kArchitecture >= kMmaArchitecture) {
    weight_share_on_tensor_cores<T, kChannelsLast, kVector>(c, num_pixels, splits, partials);
  }
}

}  // namespace fused
