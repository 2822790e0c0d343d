// Correlation where a group has one source or one destination channel: nothing is shared between
// channels that a tile could save, so every thread sums its own result from memory.
//
// Grid: as many blocks as hold all results; one thread owns one result, lanes run along what lies
// side by side in the destination (pixels, or channels), so that their loads do too. Neighbouring
// results read the same rows out of the first-level cache.
#pragma once

#include "conv/conv_activation.cuh"
#include "conv/conv_gather.cuh"

namespace fused {

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kConvThreads)
    conv_depthwise_kernel(const Correlation c, const int64_t num_pixels) {
  using A = Accumulator<T>;
  const int64_t channels = int64_t{c.groups} * c.rows;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= num_pixels * channels) return;
  const int64_t space = int64_t{c.count[0]} * c.count[1] * c.count[2];
  // Channels fastest, or pixels of one image, then channels, then images.
  const int64_t channel = kChannelsLast ? index % channels : index / space % channels;
  const int64_t pixel_index =
      kChannelsLast ? index / channels : index / space / channels * space + index % space;
  const PixelEntry pixel = decode_pixel(c, pixel_index, num_pixels);
  const int32_t group = static_cast<int32_t>(channel / c.rows);
  const T* weight = static_cast<const T*>(c.weight) + group * c.weight_stride.group +
                    (channel - int64_t{group} * c.rows) * c.weight_stride.row;
  const T* source =
      static_cast<const T*>(c.source) + int64_t{group} * c.depth * c.source_stride.channel;

  A sum = 0;
  for (int32_t d = 0; d < c.depth; ++d) {
    for (int32_t w = 0; w < c.taps[0]; ++w) {
      const int32_t z = pixel.at[0] + c.tap_step[0] * w;
      if (z < 0 || z >= c.source_size[0]) continue;
      for (int32_t v = 0; v < c.taps[1]; ++v) {
        const int32_t y = pixel.at[1] + c.tap_step[1] * v;
        if (y < 0 || y >= c.source_size[1]) continue;
        const T* line = source + pixel.source + d * c.source_stride.channel +
                        int64_t{c.tap_step[0]} * w * c.source_stride.space[0] +
                        int64_t{c.tap_step[1]} * v * c.source_stride.space[1];
        const T* tap = weight + d * c.weight_stride.depth + w * c.weight_stride.tap[0] +
                       v * c.weight_stride.tap[1];
        for (int32_t u = 0; u < c.taps[2]; ++u) {
          const int32_t x = pixel.at[2] + c.tap_step[2] * u;
          if (x < 0 || x >= c.source_size[2]) continue;
          sum += load(line[int64_t{c.tap_step[2]} * u * c.source_stride.space[2]]) *
                 load(tap[u * c.weight_stride.tap[2]]);
        }
      }
    }
  }

  const int64_t offset = pixel.dest + channel * c.dest_stride.channel;
  if (c.maybe_bias != nullptr) sum += load(static_cast<const T*>(c.maybe_bias)[channel]);
  if (c.maybe_pre != nullptr) static_cast<T*>(c.maybe_pre)[offset] = store<T>(sum);
  static_cast<T*>(c.dest)[offset] = store<T>(activate(c.activation, sum));
}

}  // namespace fused
