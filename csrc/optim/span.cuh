// How a warp reads and writes an array: 256 elements at a time, which is a block of int8 states.
//
// Each lane holds eight of them, in packs of 16 bytes of the parameter that lie side by side across
// the warp: two to four loads of each array are in flight. The last elements of a tensor, and all
// of a misaligned one, are read one by one.
#pragma once

#include "common/warp.cuh"
#include "optim/quantize.h"
#include "optim/tensor_table.cuh"

namespace fused {

constexpr int kLaneElements = kQuantBlock / kWarpSize;

// Up to 256 elements of a tensor, and which of them a lane holds.
struct Span {
  int64_t begin;
  int count;
  bool packed;  // whole and aligned
  int lane;
};

// kCount elements of X that are read and written together, by accesses of up to 16 bytes.
template <typename X, int kCount>
struct alignas(sizeof(X) * kCount < 16 ? sizeof(X) * kCount : 16) Group {
  X element[kCount];
};

// Element j of a lane, counted from the span's begin. kPack elements lie side by side.
template <int kPack>
__device__ __forceinline__ int element_of(const Span& span, int j) {
  return (j / kPack * kWarpSize + span.lane) * kPack + j % kPack;
}

template <int kPack, typename X>
__device__ __forceinline__ void load_span(const X* data, const Span& span,
                                          X (&out)[kLaneElements]) {
  assume_global(data);
  data += span.begin;
  if (span.packed) {
#pragma unroll
    for (int j = 0; j < kLaneElements; j += kPack) {
      const auto group =
          *reinterpret_cast<const Group<X, kPack>*>(data + element_of<kPack>(span, j));
#pragma unroll
      for (int e = 0; e < kPack; ++e) out[j + e] = group.element[e];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      const int i = element_of<kPack>(span, j);
      out[j] = i < span.count ? data[i] : X{};
    }
  }
}

template <int kPack, typename X>
__device__ __forceinline__ void store_span(const X (&values)[kLaneElements], const Span& span,
                                           X* data) {
  assume_global(data);
  data += span.begin;
  if (span.packed) {
#pragma unroll
    for (int j = 0; j < kLaneElements; j += kPack) {
      Group<X, kPack> group;
#pragma unroll
      for (int e = 0; e < kPack; ++e) group.element[e] = values[j + e];
      *reinterpret_cast<Group<X, kPack>*>(data + element_of<kPack>(span, j)) = group;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      const int i = element_of<kPack>(span, j);
      if (i < span.count) data[i] = values[j];
    }
  }
}

}  // namespace fused
