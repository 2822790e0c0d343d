// What the launchers share.
#pragma once

#include "common/launch.h"
#include "conv/conv_gather.cuh"

namespace fused {

constexpr int64_t kMaxBlocks = 0x7fffffff;

inline int64_t num_pixels(const Correlation& c) {
  return int64_t{c.batch} * c.count[0] * c.count[1] * c.count[2];
}

// Whether the channels of a group can be read kCount at a time, whatever the pixel. The stride of
// an axis of one position is never used.
template <typename T, int kCount>
bool reads_in(const void* data, const ConvStrides& strides, int32_t channels, int32_t batch,
              const int32_t (&size)[3]) {
  if (strides.channel != 1 || channels % kCount != 0) return false;
  int64_t bits = batch > 1 ? strides.outer : 0;
  for (int axis = 0; axis < 3; ++axis) bits |= size[axis] > 1 ? strides.space[axis] : 0;
  return bits % kCount == 0 && reinterpret_cast<uintptr_t>(data) % (kCount * sizeof(T)) == 0;
}

template <typename T, int kCount>
bool reads_source_in(const Correlation& c) {
  return reads_in<T, kCount>(c.source, c.source_stride, c.depth, c.batch, c.source_size);
}

// kConvThreads threads in each of `blocks` blocks.
template <int kArchitecture = 75, typename... Params, typename... Args>
Status launch_flat(void (*kernel)(Params...), int64_t blocks, size_t shared_bytes, Stream stream,
                   const Args&... args) {
  if (blocks > kMaxBlocks) return "the output needs more than 2^31 - 1 blocks";
  return launch<kArchitecture>(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kConvThreads),
                               shared_bytes, stream, args...);
}

// Products of one sum, which the kernels count in 32 bits.
inline Status check_products(const Correlation& c) {
  const int64_t products = int64_t{c.depth} * c.taps[0] * c.taps[1] * c.taps[2];
  return products > kMaxBlocks - kConvThreads ? "a weight's row has 2^31 elements or more"
                                              : nullptr;
}

}  // namespace fused
