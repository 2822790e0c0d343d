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

template <typename T>
SourceAccess source_access(const Correlation& c) {
  if (reads_source_in<T, kChunk<T>>(c)) return SourceAccess::kCopied;
  return c.depth % kChunk<T> == 0 ? SourceAccess::kChunks : SourceAccess::kSingly;
}

// Whether the weight lies as conv_pack_weight_kernel would lay it.
template <typename T>
bool is_packed(const Correlation& c, SourceAccess access) {
  const int64_t taps = int64_t{c.taps[0]} * c.taps[1] * c.taps[2], row = c.depth * taps;
  const bool by_channels = taps == 1 || channels_fastest(c, access);
  if (!by_channels && access == SourceAccess::kChunks) return false;
  const auto& stride = c.weight_stride;
  int64_t tap = by_channels ? c.depth : 1;
  bool packed = row % kMmaDepth == 0 && reinterpret_cast<uintptr_t>(c.weight) % 16 == 0 &&
                (c.depth == 1 || stride.depth == (by_channels ? 1 : taps)) &&
                (c.rows == 1 || stride.row == row) &&
                (c.groups == 1 || stride.group == c.rows * row);
  for (int axis = 2; axis >= 0; --axis) {
    packed &= c.taps[axis] == 1 || stride.tap[axis] == tap;
    tap *= c.taps[axis];
  }
  return packed;
}

template <typename T, int kTileRows, SourceAccess kAccess>
Status launch_correlate(const Correlation& c, bool channels_last, const T* packed, Stream stream) {
  using Tile = CorrelateMmaTile<T, kTileRows>;
  using Memory = CorrelateMmaMemory<T, Tile, kAccess>;
  const int64_t pixels = num_pixels(c);
  return launch_flat<kMmaArchitecture>(conv_mma_correlate_kernel<T, kTileRows, kAccess>,
                                       correlate_blocks<kTileRows>(c, pixels, Tile::kPixels),
                                       sizeof(Memory), stream, c, packed, pixels, channels_last);
}

// The tile changes the order of no sum. The largest, unless halves of it leave less of the last one
// empty, or it would not give every multiprocessor a block.
template <typename T, SourceAccess kAccess>
Status correlate_tiled(const Correlation& c, bool channels_last, const T* packed, Stream stream) {
  if (c.rows <= 16) return launch_correlate<T, 16, kAccess>(c, channels_last, packed, stream);
  if (c.rows <= 32) return launch_correlate<T, 32, kAccess>(c, channels_last, packed, stream);
  const bool wasteful = (c.rows - 1) % 128 < 64;
  const int64_t blocks = correlate_blocks<128>(c, num_pixels(c), CorrelateMmaTile<T, 128>::kPixels);
  if (wasteful || blocks < num_multiprocessors()) {
    return launch_correlate<T, 64, kAccess>(c, channels_last, packed, stream);
  }
  return launch_correlate<T, 128, kAccess>(c, channels_last, packed, stream);
}

template <typename T>
Status correlate(const Correlation& c, bool channels_last, T* room, Stream stream) {
  const SourceAccess access = source_access<T>(c);
  const T* packed = room;
  if (is_packed<T>(c, access)) {
    packed = static_cast<const T*>(c.weight);
  } else {
    const int64_t chunks = int64_t{c.groups} * c.rows * mma_steps(c) * kDepthChunks<T>;
    const Status status = launch_flat(conv_pack_weight_kernel<T>, ceil_div(chunks, kConvThreads), 0,
                                      stream, c, access, room);
    if (status) return status;
  }
  switch (access) {
    case SourceAccess::kCopied:
      return correlate_tiled<T, SourceAccess::kCopied>(c, channels_last, packed, stream);
    case SourceAccess::kChunks:
      return correlate_tiled<T, SourceAccess::kChunks>(c, channels_last, packed, stream);
    case SourceAccess::kSingly:
      break;
  }
  return correlate_tiled<T, SourceAccess::kSingly>(c, channels_last, packed, stream);
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
  return fit_tensor_cores(c.dtype, c.allow_tf32) &&
         compiled_architecture<conv_mma_backward_weight_kernel<Half, true, true>>() >=
             kMmaArchitecture;
}

Status conv_mma_correlate(const Correlation& c, bool channels_last, void* room, Stream stream) {
  return visit_mma_dtype(c.dtype, [&](auto type) {
    return correlate(c, channels_last, static_cast<decltype(type)*>(room), stream);
  });
}

Status conv_mma_backward_weight(const Correlation& c, bool channels_last, int32_t splits,
                                float* partials, Stream stream) {
  return visit_mma_dtype(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (!channels_last) return launch_weight<T, false, false>(c, splits, partials, stream);
    if constexpr (sizeof(T) == 2) {
      if (reads_source_in<T, kChunk<T>>(c) &&
          reads_in<T, kChunk<T>>(c.dest, c.dest_stride, c.rows, c.batch, c.count)) {
        return launch_weight<T, true, true>(c, splits, partials, stream);
      }
    }
    return launch_weight<T, true, false>(c, splits, partials, stream);
  });
}

}  // namespace fused
