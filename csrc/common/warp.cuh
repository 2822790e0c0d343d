// Reductions inside a warp, in an order that does not depend on the schedule.
#pragma once

#include "common/compensated_sum.h"
#include "common/simt.h"

namespace fused {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Of every kLanes neighbours.
template <int kLanes = kWarpSize, typename A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

template <int kLanes = kWarpSize, typename A>
__device__ __forceinline__ CompensatedSum<A> compensated_warp_sum(CompensatedSum<A> value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value.add(CompensatedSum<A>{__shfl_xor_sync(kFullWarp, value.sum, offset),
                                __shfl_xor_sync(kFullWarp, value.rounded_off, offset)});
  }
  return value;
}

// NaN wins, as in torch.max.
template <typename A>
__device__ __forceinline__ A max_or_nan(A value, A other) {
  return (other > value || other != other) ? other : value;
}

template <typename A>
__device__ __forceinline__ A warp_max(A value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = max_or_nan(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

}  // namespace fused
