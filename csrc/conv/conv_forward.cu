// Launches of the forward pass, of the gradient of the input and of the gradient through the
// activation.
#include "conv/conv_correlate.cuh"
#include "conv/conv_depthwise.cuh"
#include "conv/conv_launch.h"
#include "conv/conv_mma.h"

namespace fused {
namespace {

template <typename T, int kTileRows, bool kChannelsLast, bool kVector>
Status launch_correlate(const Correlation& c, Stream stream) {
  using Tiles = CorrelateTiles<Accumulator<T>, kTileRows>;
  const int64_t pixels = num_pixels(c);
  const int64_t blocks = correlate_blocks<kTileRows>(c, pixels, Tiles::kTilePixels);
  return launch_flat(conv_correlate_kernel<T, kTileRows, kChannelsLast, kVector>, blocks,
                     sizeof(Tiles), stream, c, pixels);
}

template <typename T, int kTileRows>
Status correlate_tiled(const Correlation& c, bool channels_last, Stream stream) {
  if (!channels_last) return launch_correlate<T, kTileRows, false, false>(c, stream);
  return reads_source_in<T, 4>(c) ? launch_correlate<T, kTileRows, true, true>(c, stream)
                                  : launch_correlate<T, kTileRows, true, false>(c, stream);
}

template <typename T>
Status correlate(const Correlation& c, void* maybe_packed, Stream stream) {
  if (Status status = check_products(c)) return status;
  const bool channels_last = c.dest_stride.channel == 1 && int64_t{c.groups} * c.rows > 1;
  if (takes_depthwise_kernel(c.groups, c.rows, c.depth)) {
    const int64_t pixels = num_pixels(c);
    const int64_t blocks = ceil_div(pixels * c.groups * c.rows, kConvThreads);
    const auto kernel =
        channels_last ? conv_depthwise_kernel<T, true> : conv_depthwise_kernel<T, false>;
    return launch_flat(kernel, blocks, 0, stream, c, pixels);
  }
  if (maybe_packed != nullptr && conv_mma_supported(c)) {
    return conv_mma_correlate(c, channels_last, maybe_packed, stream);
  }
  // Few rows (the gradient of an image, small groups): a flat tile, so that most of it is used.
  return c.rows <= 16 ? correlate_tiled<T, 16>(c, channels_last, stream)
                      : correlate_tiled<T, 64>(c, channels_last, stream);
}

bool same(const ConvStrides& a, const ConvStrides& b) {
  return a.outer == b.outer && a.channel == b.channel && a.space[0] == b.space[0] &&
         a.space[1] == b.space[1] && a.space[2] == b.space[2];
}

template <typename T>
bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(StoredFour<T>) == 0;
}

template <typename T>
Status activation_backward(const ConvActivationBackwardParams& p, Stream stream) {
  const int64_t count = int64_t{p.batch} * p.channels * p.size[0] * p.size[1] * p.size[2];
  // grad_pre has no gaps: what lies as it does has none either.
  if (count % 4 == 0 && same(p.grad_output_stride, p.grad_pre_stride) &&
      same(p.saved_stride, p.grad_pre_stride) && is_aligned<T>(p.grad_output) &&
      is_aligned<T>(p.saved) && is_aligned<T>(p.grad_pre)) {
    return launch_flat(conv_activation_backward_flat_kernel<T>, ceil_div(count / 4, kConvThreads),
                       0, stream, p, count);
  }
  const auto kernel = p.grad_pre_stride.channel == 1 && p.channels > 1
                          ? conv_activation_backward_kernel<T, true>
                          : conv_activation_backward_kernel<T, false>;
  return launch_flat(kernel, ceil_div(count, kConvThreads), 0, stream, p, count);
}

}  // namespace

Status conv_forward_cuda(const ConvForwardParams& params, Stream stream) {
  return visit_dtype(params.dtype, [&](auto type) {
    return correlate<decltype(type)>(forward_correlation(params), params.maybe_packed, stream);
  });
}

Status conv_backward_input_cuda(const ConvBackwardInputParams& params, Stream stream) {
  return visit_dtype(params.dtype, [&](auto type) {
    return for_each_backward_input_correlation(params, [&](const Correlation& c) {
      return correlate<decltype(type)>(c, params.maybe_packed, stream);
    });
  });
}

Status conv_activation_backward_cuda(const ConvActivationBackwardParams& params, Stream stream) {
  return visit_dtype(
      params.dtype, [&](auto type) { return activation_backward<decltype(type)>(params, stream); });
}

}  // namespace fused
