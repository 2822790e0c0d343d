// How the CUDA kernels address a convolution: a pixel and a (channel, tap) are decoded once, by one
// thread, into an offset and a position along each axis; an element is where the two offsets add
// up, and it is inside where the two positions do. The tiles of these entries live in shared
// memory.
#pragma once

#include "common/dtype.h"
#include "common/launch.h"
#include "conv/correlation.h"

namespace fused {

constexpr int kConvThreads = 256;
constexpr int kStepDepth = 16;  // products summed between two barriers
constexpr int kPad = 4;         // keeps rows of a tile in different banks, and 16-byte aligned

// Four neighbours of a tile's row, which every thread multiplies at a time.
template <typename A>
struct alignas(16) Four {
  A element[4];
};

// Four neighbours in memory.
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) StoredFour {
  T element[4];
};

struct PixelEntry {
  int64_t source;  // offset of the position that tap (0, 0, 0) reads; may lie outside
  int64_t dest;    // offset of the destination, -1 beyond the last
  int32_t at[3];   // that position
};

struct TapEntry {
  int64_t source;  // offset from the pixel's
  int64_t weight;  // offset of the weight, less its row's; -1 beyond the last
  int32_t delta[3];
};

// A destination pixel: an image, and a position along each axis.
struct PixelPlace {
  int64_t image;
  int32_t at[3];
};

// In 32 bits where they do: a division of 64 takes several times as long.
template <typename Index>
__device__ __forceinline__ PixelPlace pixel_place_in(const Correlation& c, Index index) {
  PixelPlace place;
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    const Index count = static_cast<Index>(c.count[axis]);
    place.at[axis] = static_cast<int32_t>(index % count);
    index /= count;
  }
  place.image = index;
  return place;
}

// Destination pixel `index` of all batch * count pixels.
__device__ __forceinline__ PixelPlace pixel_place(const Correlation& c, int64_t index) {
  return index <= UINT32_MAX ? pixel_place_in(c, static_cast<uint32_t>(index))
                             : pixel_place_in(c, static_cast<uint64_t>(index));
}

__device__ __forceinline__ PixelEntry pixel_entry(const Correlation& c, const PixelPlace& place,
                                                  bool exists) {
  PixelEntry p;
  p.dest = -1;
  p.source = 0;
  if (!exists) {
    p.at[0] = p.at[1] = p.at[2] = INT32_MIN / 2;  // inside nothing
    return p;
  }
  p.source = place.image * c.source_stride.outer;
  p.dest = place.image * c.dest_stride.outer;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    p.at[axis] = c.start[axis] + c.step[axis] * place.at[axis];
    p.source += p.at[axis] * c.source_stride.space[axis];
    p.dest += place.at[axis] * c.dest_stride.space[axis];
  }
  return p;
}

__device__ __forceinline__ PixelEntry decode_pixel(const Correlation& c, int64_t index,
                                                   int64_t num_pixels) {
  return pixel_entry(c, pixel_place(c, index), index < num_pixels);
}

__device__ __forceinline__ TapEntry tap_entry(const Correlation& c, int32_t channel, int32_t tap,
                                              bool exists) {
  TapEntry t;
  t.source = 0;
  t.weight = -1;
  if (!exists) {
    t.delta[0] = t.delta[1] = t.delta[2] = INT32_MIN / 2;  // inside nothing
    return t;
  }
  t.source = channel * c.source_stride.channel;
  t.weight = channel * c.weight_stride.depth;
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    const int32_t u = tap % c.taps[axis];
    tap /= c.taps[axis];
    t.delta[axis] = c.tap_step[axis] * u;
    t.source += t.delta[axis] * c.source_stride.space[axis];
    t.weight += u * c.weight_stride.tap[axis];
  }
  return t;
}

// Product `index` of a destination's depth * taps: channels fastest in channels-last tensors, taps
// fastest in others.
template <bool kChannelsLast>
__device__ __forceinline__ TapEntry decode_tap(const Correlation& c, int32_t index, int32_t taps) {
  const int32_t tap = kChannelsLast ? index / c.depth : index % taps;
  const int32_t channel = kChannelsLast ? index % c.depth : index / taps;
  return tap_entry(c, channel, tap, index < c.depth * taps);
}

// The first channel of a group in the source.
template <typename T>
__device__ __forceinline__ const T* group_source(const Correlation& c, int32_t group) {
  return static_cast<const T*>(c.source) + int64_t{group} * c.depth * c.source_stride.channel;
}

__device__ __forceinline__ bool is_inside(const Correlation& c, const PixelEntry& p,
                                          const TapEntry& t) {
  bool inside = true;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    // One comparison for both ends: what is negative is huge as unsigned.
    inside &= static_cast<uint32_t>(p.at[axis] + t.delta[axis]) <
              static_cast<uint32_t>(c.source_size[axis]);
  }
  return inside;
}

// Long sums are cut into blocks of this many steps: one chain of additions would lose a digit more
// than the blocked products of a library do.
constexpr int kStepsInBlock = 4;

template <typename A>
__device__ __forceinline__ void end_block(A (&sums)[4][4], A (&totals)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      totals[i][j] += sums[i][j];
      sums[i][j] = 0;
    }
  }
}

// sums[i][j] += a row's four elements times a column's four, for each of kStepDepth products.
template <typename A, int kRowA, int kRowB>
__device__ __forceinline__ void multiply_tiles(const A (*a)[kRowA], const A (*b)[kRowB],
                                               int first_a, int first_b, A (&sums)[4][4]) {
#pragma unroll
  for (int k = 0; k < kStepDepth; ++k) {
    const Four<A> x = *reinterpret_cast<const Four<A>*>(&a[k][first_a]);
    const Four<A> y = *reinterpret_cast<const Four<A>*>(&b[k][first_b]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += x.element[i] * y.element[j];
    }
  }
}

}  // namespace fused
