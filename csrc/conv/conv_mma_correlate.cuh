// Correlation (the forward pass and the gradient of the input, see correlation.h) as an implicit
// matrix product on tensor cores, weight [row, depth] by source [depth, pixel].
//
// A first kernel lays the weight out as the second reads it: rows of depth, channels fastest in
// channels-last tensors and taps in others, with zeros behind them to whole steps. That is a copy
// of the weight, small beside what it is multiplied with, for which the second kernel has one way
// to read any weight, forward or backward: 16 bytes at a time and past the registers.
//
// Grid: as the portable kernel's (conv_correlate.cuh), in larger tiles. 256 threads; a warp has kM
// tiles of 16 rows by kN tiles of 8 pixels. Weights come kStages - 1 steps ahead of their products.
// So does the source where kVector says that eight channels lie side by side; else it is gathered
// into registers while the step before is multiplied. In the end the sums pass through shared
// memory, so that bias, activation and the way out are the portable kernel's.
#pragma once

#include "conv/conv_correlate.cuh"
#include "conv/conv_mma_tile.cuh"

namespace fused {

// Depth of a packed weight, in whole steps.
__host__ __device__ __forceinline__ int32_t mma_steps(const Correlation& c) {
  return (c.depth * c.taps[0] * c.taps[1] * c.taps[2] + kMmaDepth - 1) / kMmaDepth;
}

// Grid: a thread for each element of packed [groups, rows, steps * kMmaDepth].
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kConvThreads)
    conv_pack_weight_kernel(const Correlation c, T* packed, const int64_t count) {
  const int64_t index = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  if (index >= count) return;
  const int64_t padded = int64_t{mma_steps(c)} * kMmaDepth, row = index / padded;
  const TapEntry tap = decode_tap<kChannelsLast>(c, static_cast<int32_t>(index % padded),
                                                 c.taps[0] * c.taps[1] * c.taps[2]);
  const T* weight = static_cast<const T*>(c.weight) + row / c.rows * c.weight_stride.group +
                    row % c.rows * c.weight_stride.row;
  packed[index] = tap.weight >= 0 ? weight[tap.weight] : T{};
}

// Tiles of kRows channels by kPixels pixels. Few rows (the gradient of an image, small groups): a
// flat tile, so that most of it is used.
//
//   rows  pixels  floats of sums in a thread  shared memory of three stages, 16 bits
//    128     128                          64                                   48 KB
//     64     128                          32                                   36 KB
//     16     256                          16                                   51 KB
//
// Not timed on any GPU: two blocks a multiprocessor are what registers and shared memory of sm_80
// and sm_90 allow, and three stages are the fewest in which a copy has a whole step to arrive.
template <typename T, int kRows_>
struct CorrelateMmaTile {
  static constexpr int kRows = kRows_;
  static constexpr int kPixels = kRows == 16 ? 256 : 128;
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;
  static constexpr int kWarpsOfRows = kRows == 16 ? 1 : 2;
  static constexpr int kM = kRows / kWarpsOfRows / 16;
  static constexpr int kN = kPixels * kWarpsOfRows / kConvWarps / 8;
};

template <typename T, class Tile, bool kChannelsLast, bool kVector>
struct CorrelateMmaMemory {
  static constexpr int kDepthOfTap = kVector ? kChunk<T> : 1;  // products that one entry serves
  static constexpr int kTaps = kMmaDepth / kDepthOfTap;
  // Sums on their way out: as many rows at a time as have room, what lies side by side in memory
  // along them. Eight floats more, so that the lanes' pairs lie in different banks.
  static constexpr int kAlong = kChannelsLast ? Tile::kRows : Tile::kPixels;
  static constexpr int kAcross = kChannelsLast ? Tile::kPixels : Tile::kRows;
  static constexpr int kAcrossAtOnce = kAcross < 64 ? kAcross : 64;
  struct Stage {
    T weight[Tile::kRows * kMmaDepth];
    T source[Tile::kPixels * kMmaDepth];
  };

  union {
    Stage stages[Tile::kStages];
    float sums[kAcrossAtOnce][kAlong + 8];
  };
  PixelEntry pixels[Tile::kPixels];
  TapEntry taps[Tile::kStages][kTaps];  // of steps by turns
};

// Hands the block's sums to finish_sums, four rows by four pixels to a thread.
template <typename T, class Tile, bool kChannelsLast, class Memory>
__device__ __forceinline__ void finish_tile(const Correlation& c, const CorrelatePlace& place,
                                            Memory& memory, int warp_row, int warp_pixel,
                                            const float (&sums)[Tile::kM][Tile::kN][4]) {
  constexpr int kLanes = Memory::kAlong / 4;
  constexpr int kFours = Memory::kAcrossAtOnce / 4 * kLanes;
#pragma unroll 1
  for (int first = 0; first < Memory::kAcross; first += Memory::kAcrossAtOnce) {
    __syncthreads();  // what lay there has been read
    for_each_element<Tile::kM, Tile::kN>([&](int m, int n, int i) {
      const int row = warp_row + row_of_element(m, i);
      const int pixel = warp_pixel + column_of_element(n, i);
      const int across = (kChannelsLast ? pixel : row) - first;
      if (across >= 0 && across < Memory::kAcrossAtOnce) {
        memory.sums[across][kChannelsLast ? row : pixel] = sums[m][n][i];
      }
    });
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kFours; i += kConvThreads) {
      const int along = i % kLanes * 4, across = i / kLanes * 4;
      const int row = kChannelsLast ? along : first + across;
      const int pixel = kChannelsLast ? first + across : along;
      float four[4][4];
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const Pack<float> side = load_pack(&memory.sums[across + a][along]);
#pragma unroll
        for (int b = 0; b < 4; ++b)
          four[kChannelsLast ? b : a][kChannelsLast ? a : b] = side.element[b];
      }
      finish_sums<T, kChannelsLast>(c, memory.pixels + pixel, place.first_channel + row,
                                    place.rows - row, four);
    }
  }
}

template <typename T, class Tile, bool kChannelsLast, bool kVector>
__device__ __forceinline__ void correlate_on_tensor_cores(const Correlation& c, const T* packed,
                                                          int64_t num_pixels) {
  using Memory = CorrelateMmaMemory<T, Tile, kChannelsLast, kVector>;
  constexpr int kStages = Tile::kStages, kChunks = kDepthChunks<T>;
  Memory& memory = *shared_memory<Memory>();
  const auto place = correlate_place<Tile::kRows, Tile::kPixels>(c);
  const T* source = group_source<T>(c, place.group);
  const int32_t taps = c.taps[0] * c.taps[1] * c.taps[2], steps = mma_steps(c);
  const int64_t padded = int64_t{steps} * kMmaDepth;
  const T* weight = packed + place.first_channel * padded;
  const int thread = threadIdx.x;

  // Divisions, for which nobody waits: each step's by another warp, long before it is fetched.
  const auto decode_taps = [&](int32_t step) {
    const int entry = thread - step % kConvWarps * kWarpSize;
    if (entry >= 0 && entry < Memory::kTaps) {
      memory.taps[step % kStages][entry] =
          decode_tap<kChannelsLast>(c, step * kMmaDepth + entry * Memory::kDepthOfTap, taps);
    }
  };
  const auto begin_copies = [&](int32_t step) {
    auto& stage = memory.stages[step % kStages];
#pragma unroll
    for (int i = thread; i < Tile::kRows * kChunks; i += kConvThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      // Of no bytes the address does not matter.
      ptx::cp_async_16(stage.weight + chunk_offset<T, kMmaDepth>(row, chunk),
                       weight + row * padded + step * kMmaDepth + chunk * kChunk<T>,
                       row < place.rows ? 16 : 0);
    }
    if constexpr (kVector) {
#pragma unroll
      for (int i = thread; i < Tile::kPixels * kChunks; i += kConvThreads) {
        const PixelEntry& pixel = memory.pixels[i / kChunks];
        const TapEntry& tap = memory.taps[step % kStages][i % kChunks];
        const bool inside = is_inside(c, pixel, tap);
        ptx::cp_async_16(stage.source + chunk_offset<T, kMmaDepth>(i / kChunks, i % kChunks),
                         inside ? source + pixel.source + tap.source : source, inside ? 16 : 0);
      }
    }
  };
  ChunkCarrier<T, Tile::kPixels, true> carrier;
  const auto gather = [&](int32_t step) {
    const auto& step_taps = memory.taps[step % kStages];
    carrier.fetch([&](int row, int depth) {
      const PixelEntry& pixel = memory.pixels[row];
      const TapEntry& tap = step_taps[depth];
      return is_inside(c, pixel, tap) ? source[pixel.source + tap.source] : T{};
    });
  };

  for (int i = thread; i < Tile::kPixels; i += kConvThreads) {
    memory.pixels[i] = decode_pixel(c, place.first_pixel + i, num_pixels);
  }
#pragma unroll 1
  for (int step = 0; step < kStages; ++step) decode_taps(step);
  __syncthreads();
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) begin_copies(step);
    ptx::cp_async_commit();  // an empty group too, so that they can be counted
  }
  if constexpr (!kVector) {
    gather(0);
    carrier.put(memory.stages[0].source);
  }

  const int warp_row = warp_index() % Tile::kWarpsOfRows * Tile::kM * 16;
  const int warp_pixel = warp_index() / Tile::kWarpsOfRows * Tile::kN * 8;
  float sums[Tile::kM][Tile::kN][4] = {};
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the step is there for all, and all are done with the one before
    if (step + kStages - 1 < steps) begin_copies(step + kStages - 1);
    ptx::cp_async_commit();
    decode_taps(step + kStages);
    if constexpr (!kVector) gather(step + 1);  // nothing behind the last: no tap is inside
    const auto& stage = memory.stages[step % kStages];
    add_row_products<kMmaDepth>(stage.weight, warp_row, stage.source + warp_pixel * kMmaDepth,
                                sums);
    if constexpr (!kVector) carrier.put(memory.stages[(step + 1) % kStages].source);
  }
  finish_tile<T, Tile, kChannelsLast>(c, place, memory, warp_row, warp_pixel, sums);
}

template <typename T, int kTileRows, bool kChannelsLast, bool kVector>
__global__ void __launch_bounds__(kConvThreads, kVector || sizeof(T) == 2 ? 2 : 1)
    conv_mma_correlate_kernel(const Correlation c, const T* packed, const int64_t num_pixels) {
  if constexpr (ptx::kArchitecture >= kMmaArchitecture) {
    correlate_on_tensor_cores<T, CorrelateMmaTile<T, kTileRows>, kChannelsLast, kVector>(
        c, packed, num_pixels);
  }
}

}  // namespace fused
