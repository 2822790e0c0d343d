// Launches of the tensor-core kernels.
#include "conv/conv_launch.h"
#include "conv/conv_mma.h"
#include "conv/conv_mma_backward_weight.cuh"
#include "conv/conv_mma_correlate.cuh"

namespace fused {
namespace {

// Calls visitor(T{}) for the element type.
template <typename Visitor>
Status visit_mma_dtype(DType dtype, Visitor&& visitor) {
  if (dtype == DType::kFloat16) return visitor(Half{});
  return dtype == DType::kBFloat16 ? visitor(BFloat16{}) : visitor(float{});
}

template <typename T, int kTileRows, bool kChannelsLast, bool kVector>
Status launch_correlate(const Correlation& c, const T* packed, Stream stream) {
  using Tile = CorrelateMmaTile<T, kTileRows>;
  using Memory = CorrelateMmaMemory<T, Tile, kChannelsLast, kVector>;
  const int64_t pixels = num_pixels(c);
  return launch_flat<kMmaArchitecture>(
      conv_mma_correlate_kernel<T, kTileRows, kChannelsLast, kVector>,
      correlate_blocks<kTileRows>(c, pixels, Tile::kPixels), sizeof(Memory), stream, c, packed,
      pixels);
}

template <typename T, bool kChannelsLast, bool kVector>
Status correlate_tiled(const Correlation& c, const T* packed, Stream stream) {
  if (c.rows <= 16) return launch_correlate<T, 16, kChannelsLast, kVector>(c, packed, stream);
  return c.rows <= 64 ? launch_correlate<T, 64, kChannelsLast, kVector>(c, packed, stream)
                      : launch_correlate<T, 128, kChannelsLast, kVector>(c, packed, stream);
}

template <typename T>
Status correlate(const Correlation& c, bool channels_last, T* packed, Stream stream) {
  const int64_t count = int64_t{c.groups} * c.rows * mma_steps(c) * kMmaDepth;
  const auto pack =
      channels_last ? conv_pack_weight_kernel<T, true> : conv_pack_weight_kernel<T, false>;
  Status status = launch_flat(pack, ceil_div(count, kConvThreads), 0, stream, c, packed, count);
  if (status) return status;
  if (!channels_last) return correlate_tiled<T, false, false>(c, packed, stream);
  return reads_source_in<T, kChunk<T>>(c) ? correlate_tiled<T, true, true>(c, packed, stream)
                                          : correlate_tiled<T, true, false>(c, packed, stream);
}

template <typename T, bool kChannelsLast, bool kVector>
Status launch_weight(const Correlation& c, int32_t splits, float* partials, Stream stream) {
  using Tile = WeightMmaTile;
  const int64_t columns = int64_t{c.depth} * c.taps[0] * c.taps[1] * c.taps[2];
  const int64_t blocks =
      ceil_div(c.rows, Tile::kRows) * ceil_div(columns, Tile::kColumns) * c.groups * splits;
  return launch_flat<kMmaArchitecture>(conv_mma_backward_weight_kernel<T, kChannelsLast, kVector>,
                                       blocks, sizeof(WeightMmaMemory<T, kVector>), stream, c,
                                       num_pixels(c), splits, partials);
}

}  // namespace

bool conv_mma_supported(const Correlation& c) {
  if (c.dtype == DType::kFloat64 || (c.dtype == DType::kFloat32 && !c.allow_tf32)) return false;
  return compiled_architecture(conv_mma_backward_weight_kernel<Half, true, true>) >=
         kMmaArchitecture;
}

Status conv_mma_correlate(const Correlation& c, bool channels_last, void* packed, Stream stream) {
  return visit_mma_dtype(c.dtype, [&](auto type) {
    return correlate(c, channels_last, static_cast<decltype(type)*>(packed), stream);
  });
}

Status conv_mma_backward_weight(const Correlation& c, bool channels_last, int32_t splits,
                                float* partials, Stream stream) {
  return visit_mma_dtype(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (!channels_last) return launch_weight<T, false, false>(c, splits, partials, stream);
    if constexpr (sizeof(T) == 2) {
      if (reads_source_in<T, kChunk<T>>(c) &&
          reads_in<T, kChunk<T>>(c.dest, c.dest_stride, c.rows)) {
        return launch_weight<T, true, true>(c, splits, partials, stream);
      }
    }
    return launch_weight<T, true, false>(c, splits, partials, stream);
  });
}

}  // namespace fused
