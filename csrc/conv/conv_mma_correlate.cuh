// Correlation (the forward pass and the gradient of the input, see correlation.h) as an implicit
// matrix product on tensor cores, weight [row, depth] by source [depth, pixel].
//
// A first kernel lays the weight out as the second reads it: rows of depth, in an order that suits
// the source, with zeros behind them to whole steps. That is a copy of the weight, small beside
// what it is multiplied with, for which the second kernel has one way to read any weight, forward
// or backward: 16 bytes at a time and past the registers. A weight that lies so already is not
// copied.
//
// Grid: as the portable kernel's (conv_correlate.cuh), in larger tiles. 256 threads; a warp has kM
// tiles of 16 rows by kN tiles of 8 pixels. Weights come kStages - 1 steps ahead of their products,
// and so does a source that can be copied; else it is gathered into registers while the step before
// is multiplied. In the end the sums pass through shared memory, so that bias, activation and the
// way out are the portable kernel's.
#pragma once

#include "conv/conv_correlate.cuh"
#include "conv/conv_mma_tile.cuh"

namespace fused {

// How the source is read, and the order of depth that goes with it.
enum class SourceAccess {
  kCopied,  // 16 bytes of channels lie side by side: channels fastest
  kChunks,  // chunks of as many channels, of any stride, under one tap: channels of a chunk
            // fastest, then taps, which find the same elements beside one another
  kSingly,  // element by element: channels fastest where they lie side by side, else taps
};

__host__ __device__ __forceinline__ bool channels_fastest(const Correlation& c,
                                                          SourceAccess access) {
  return access == SourceAccess::kCopied ||
         (access == SourceAccess::kSingly && c.source_stride.channel == 1);
}

// Product `index` of a destination's depth * taps.
template <typename T>
__device__ __forceinline__ TapEntry ordered_tap(const Correlation& c, SourceAccess access,
                                                int32_t index, int32_t taps) {
  if (channels_fastest(c, access)) return decode_tap<true>(c, index, taps);
  if (access == SourceAccess::kSingly) return decode_tap<false>(c, index, taps);
  const int32_t chunk = index / kChunk<T>;
  return tap_entry(c, chunk / taps * kChunk<T> + index % kChunk<T>, chunk % taps,
                   index < c.depth * taps);
}

// Depth of a packed weight, in whole steps.
__host__ __device__ __forceinline__ int32_t mma_steps(const Correlation& c) {
  return (c.depth * c.taps[0] * c.taps[1] * c.taps[2] + kMmaDepth - 1) / kMmaDepth;
}

// Grid: a thread for each chunk of packed [groups, rows, steps * kMmaDepth], rows or depth fastest,
// whichever is nearer together in the weight.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    conv_pack_weight_kernel(const Correlation c, const SourceAccess access, T* packed) {
  const int32_t chunks = mma_steps(c) * kDepthChunks<T>, rows = c.groups * c.rows;
  const bool rows_fastest = c.weight_stride.row < c.weight_stride.depth;
  const uint32_t fastest = rows_fastest ? rows : chunks;
  // At most a division of 64 bits for 16 bytes.
  const int64_t index = int64_t{blockIdx.x} * kConvThreads + threadIdx.x;
  const int64_t slow =
      index <= UINT32_MAX ? static_cast<uint32_t>(index) / fastest : index / fastest;
  const auto fast = static_cast<int32_t>(index - slow * fastest);
  if (slow >= (rows_fastest ? chunks : rows)) return;
  const int32_t row = rows_fastest ? fast : static_cast<int32_t>(slow);
  const int32_t chunk = rows_fastest ? static_cast<int32_t>(slow) : fast;
  const T* weight = static_cast<const T*>(c.weight) + row / c.rows * c.weight_stride.group +
                    row % c.rows * c.weight_stride.row;
  const int32_t taps = c.taps[0] * c.taps[1] * c.taps[2];
  TapEntry tap = ordered_tap<T>(c, access, chunk * kChunk<T>, taps);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
    int64_t channel = j * c.weight_stride.depth;
    if (access == SourceAccess::kSingly) {
      tap = ordered_tap<T>(c, access, chunk * kChunk<T> + j, taps);
      channel = 0;
    }
    pack.element[j] = tap.weight >= 0 ? weight[tap.weight + channel] : T{};
  }
  store_pack(packed + (int64_t{row} * chunks + chunk) * kChunk<T>, pack);
}

// Tiles of kRows channels by kPixels pixels. Few rows (the gradient of an image, small groups): a
// flat tile, so that most of it is used.
//
//   rows  pixels  floats of sums in a thread  shared memory in 16 bits
//    128     128                          64                     55 KB
//     64     128                          32                     43 KB
//     32     256                          32                     65 KB
//     16     256                          16                     62 KB
//
// Not timed on any GPU: two blocks a multiprocessor are what registers and shared memory of sm_80
// and sm_90 allow (one, on the 100 KB of sm_86, sm_89 and sm_120), and three stages are the fewest
// in which a copy has a whole step to arrive.
template <typename T, int kRows_>
struct CorrelateMmaTile {
  static constexpr int kRows = kRows_;
  static constexpr int kPixels = kRows <= 32 ? 256 : 128;
  static constexpr int kStages = sizeof(T) == 2 ? 3 : 2;
  static constexpr int kWarpsOfRows = kRows <= 32 ? 1 : 2;
  static constexpr int kM = kRows / kWarpsOfRows / 16;
  static constexpr int kN = kPixels * kWarpsOfRows / kConvWarps / 8;
};

// Sums on their way out: as many rows at a time as have room, what lies side by side in the
// destination along them. The floats behind a row keep the lanes' elements, or pairs of pixels, in
// different banks.
template <class Tile, bool kChannelsLast>
struct StagedSums {
  static constexpr int kAlong = kChannelsLast ? Tile::kRows : Tile::kPixels;
  static constexpr int kAcross = kChannelsLast ? Tile::kPixels : Tile::kRows;
  static constexpr int kAcrossAtOnce = kAcross < 64 ? kAcross : 64;
  float rows[kAcrossAtOnce][kAlong + (kChannelsLast ? 4 : 8)];
};

template <typename T, class Tile, SourceAccess kAccess>
struct CorrelateMmaMemory {
  static constexpr int kDepthOfTap = kAccess == SourceAccess::kSingly ? 1 : kChunk<T>;
  static constexpr int kTaps = kMmaDepth / kDepthOfTap;
  struct Stage {
    T weight[Tile::kRows * kMmaDepth];
    T source[Tile::kPixels * kMmaDepth];
  };

  union {
    Stage stages[Tile::kStages];
    StagedSums<Tile, false> contiguous;
    StagedSums<Tile, true> channels_last;
  };
  PixelEntry pixels[Tile::kPixels];
  TapEntry taps[Tile::kStages][kTaps];  // of steps by turns
};

// Hands the block's sums to finish_sums, four rows by four pixels to a thread.
template <typename T, class Tile, bool kChannelsLast>
__device__ __forceinline__ void finish_tile(const Correlation& c, const CorrelatePlace& place,
                                            const PixelEntry* pixels, int warp_row, int warp_pixel,
                                            const float (&sums)[Tile::kM][Tile::kN][4],
                                            StagedSums<Tile, kChannelsLast>& staged) {
  using Staged = StagedSums<Tile, kChannelsLast>;
  constexpr int kLanes = Staged::kAlong / 4;
  constexpr int kFours = Staged::kAcrossAtOnce / 4 * kLanes;
#pragma unroll 1
  for (int first = 0; first < Staged::kAcross; first += Staged::kAcrossAtOnce) {
    __syncthreads();  // what lay there has been read
    for_each_element<Tile::kM, Tile::kN>([&](int m, int n, int i) {
      const int row = warp_row + row_of_element(m, i);
      const int pixel = warp_pixel + column_of_element(n, i);
      const int across = (kChannelsLast ? pixel : row) - first;
      if (across >= 0 && across < Staged::kAcrossAtOnce) {
        staged.rows[across][kChannelsLast ? row : pixel] = sums[m][n][i];
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
        const Pack<float> side = load_pack(&staged.rows[across + a][along]);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          four[kChannelsLast ? b : a][kChannelsLast ? a : b] = side.element[b];
        }
      }
      finish_sums<T, kChannelsLast>(c, pixels + pixel, place.first_channel + row, place.rows - row,
                                    four);
    }
  }
}

template <typename T, class Tile, SourceAccess kAccess>
__device__ __forceinline__ void correlate_on_tensor_cores(const Correlation& c, const T* packed,
                                                          int64_t num_pixels, bool channels_last) {
  using Memory = CorrelateMmaMemory<T, Tile, kAccess>;
  constexpr int kStages = Tile::kStages, kChunks = kDepthChunks<T>;
  constexpr bool kCopied = kAccess == SourceAccess::kCopied;
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
          ordered_tap<T>(c, kAccess, step * kMmaDepth + entry * Memory::kDepthOfTap, taps);
    }
  };
  const auto begin_copies = [&](int32_t step) {
    auto& stage = memory.stages[step % kStages];
    for_each_share<Tile::kRows * kChunks>([&](unsigned i) {
      const int row = i / kChunks, chunk = i % kChunks;
      // Of no bytes the address does not matter.
      ptx::cp_async_16(stage.weight + chunk_offset<T, kMmaDepth>(row, chunk),
                       weight + row * padded + step * kMmaDepth + chunk * kChunk<T>,
                       row < place.rows ? 16 : 0);
    });
    if constexpr (kCopied) {
      for_each_share<Tile::kPixels * kChunks>([&](unsigned i) {
        const int row = i / kChunks, chunk = i % kChunks;
        const PixelEntry& pixel = memory.pixels[row];
        const TapEntry& tap = memory.taps[step % kStages][chunk];
        const bool inside = is_inside(c, pixel, tap);
        ptx::cp_async_16(stage.source + chunk_offset<T, kMmaDepth>(row, chunk),
                         inside ? source + pixel.source + tap.source : source, inside ? 16 : 0);
      });
    }
  };
  ChunkCarrier<T, Tile::kPixels, true> carrier;
  const auto gather = [&](int32_t step) {
    const auto& step_taps = memory.taps[step % kStages];
    if constexpr (kAccess == SourceAccess::kChunks) {
      carrier.fetch_chunks([&](int row, int chunk, T(&elements)[kChunk<T>]) {
        const PixelEntry& pixel = memory.pixels[row];
        const TapEntry& tap = step_taps[chunk];
        const bool inside = is_inside(c, pixel, tap);
        const int64_t first = pixel.source + tap.source;
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
          elements[j] = inside ? source[first + j * c.source_stride.channel] : T{};
        }
      });
    } else {
      carrier.fetch([&](int row, int depth) {
        const PixelEntry& pixel = memory.pixels[row];
        const TapEntry& tap = step_taps[depth];
        return is_inside(c, pixel, tap) ? source[pixel.source + tap.source] : T{};
      });
    }
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
  if constexpr (!kCopied) {
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
    if constexpr (!kCopied) gather(step + 1);  // nothing behind the last: no tap is inside
    const auto& stage = memory.stages[step % kStages];
    add_row_products<kMmaDepth>(stage.weight, warp_row, stage.source + warp_pixel * kMmaDepth,
                                sums);
    if constexpr (!kCopied) carrier.put(memory.stages[(step + 1) % kStages].source);
    decode_taps(step + kStages);
  }
  if (channels_last) {
    finish_tile<T>(c, place, memory.pixels, warp_row, warp_pixel, sums, memory.channels_last);
  } else {
    finish_tile<T>(c, place, memory.pixels, warp_row, warp_pixel, sums, memory.contiguous);
  }
}

template <typename T, int kTileRows, SourceAccess kAccess>
__global__ void __launch_bounds__(kConvThreads,
                                  kAccess == SourceAccess::kCopied || sizeof(T) == 2 ? 2 : 1)
    conv_mma_correlate_kernel(const Correlation c, const T* packed, const int64_t num_pixels,
                              const bool channels_last) {
  if constexpr (ptx::kArchitecture >= kMmaArchitecture) {
    correlate_on_tensor_cores<T, CorrelateMmaTile<T, kTileRows>, kAccess>(c, packed, num_pixels,
                                                                          channels_last);
  }
}

}  // namespace fused
