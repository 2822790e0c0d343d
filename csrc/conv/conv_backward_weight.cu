// Launches of the gradients of weight and bias.
#include "conv/conv_backward_weight.cuh"
#include "conv/conv_launch.h"
#include "conv/conv_mma.h"

namespace fused {
namespace {

template <typename T>
Status weight_partials(const Correlation& c, bool depthwise, bool channels_last, int32_t splits,
                       Accumulator<T>* partials, Stream stream) {
  using A = Accumulator<T>;
  const int64_t pixels = num_pixels(c), channels = int64_t{c.groups} * c.rows;
  if (depthwise) {
    const auto kernel = channels_last ? conv_strand_sums_kernel<T, true, false>
                                      : conv_strand_sums_kernel<T, false, false>;
    const int64_t blocks = ceil_div(channels, channels_last ? kStrandChannels<true> : 1) * splits;
    return launch_flat(kernel, blocks, kConvThreads * sizeof(A), stream, c, pixels, splits,
                       partials);
  }
  if constexpr (std::is_same_v<A, float>) {
    if (conv_mma_supported(c)) {
      return conv_mma_backward_weight(c, channels_last, splits, partials, stream);
    }
  }
  const int64_t columns = int64_t{c.depth} * c.taps[0] * c.taps[1] * c.taps[2];
  const int64_t blocks =
      ceil_div(c.rows, kWeightTile) * ceil_div(columns, kWeightTile) * c.groups * splits;
  const auto kernel =
      channels_last ? conv_backward_weight_kernel<T, true> : conv_backward_weight_kernel<T, false>;
  return launch_flat(kernel, blocks, sizeof(WeightTiles<A>), stream, c, pixels, splits, partials);
}

template <typename T>
Status bias_partials(const Correlation& c, bool channels_last, int32_t splits,
                     Accumulator<T>* partials, Stream stream) {
  const auto kernel = channels_last ? conv_strand_sums_kernel<T, true, true>
                                    : conv_strand_sums_kernel<T, false, true>;
  const int64_t channels = int64_t{c.groups} * c.rows;
  const int64_t blocks = ceil_div(channels, channels_last ? kStrandChannels<true> : 1) * splits;
  return launch_flat(kernel, blocks, kConvThreads * sizeof(Accumulator<T>), stream, c,
                     num_pixels(c), splits, partials);
}

template <typename T>
Status backward_weight(const ConvBackwardWeightParams& p, Stream stream) {
  using A = Accumulator<T>;
  ConvForwardParams forward{};
  forward.input = p.input;
  forward.output = const_cast<void*>(p.grad_output);  // only read: it takes the output's place
  forward.input_stride = p.input_stride;
  forward.weight_stride = p.grad_weight_stride;
  forward.output_stride = p.grad_output_stride;
  forward.geometry = p.geometry;
  forward.dtype = p.dtype;
  forward.allow_tf32 = p.allow_tf32;
  const Correlation c = forward_correlation(forward);
  if (Status status = check_products(c)) return status;
  const ConvWeightSplits splits = conv_weight_splits(p.geometry);
  const bool depthwise = is_depthwise(p.geometry);
  const bool grad_last = c.dest_stride.channel == 1 && int64_t{c.groups} * c.rows > 1;
  const int64_t out_channels = p.geometry.out_channels;
  A* partials = static_cast<A*>(p.maybe_partials);

  if (p.maybe_grad_weight != nullptr) {
    // Both operands are read along the same axis: pixels unless both have channels side by side.
    const bool channels_last =
        grad_last && (c.source_stride.channel == 1 || c.groups * c.depth == 1);
    const int32_t taps = c.taps[0] * c.taps[1] * c.taps[2];
    const int64_t count = out_channels * c.depth * taps;
    Status status =
        weight_partials<T>(c, depthwise, channels_last, splits.weight, partials, stream);
    if (status) return status;
    status = launch_flat(conv_sum_shares_kernel<T>, ceil_div(count, kConvThreads), 0, stream,
                         partials, splits.weight, count, static_cast<T*>(p.maybe_grad_weight),
                         p.grad_weight_stride, c.depth, c.taps[1], c.taps[2], taps);
    if (status) return status;
    partials += splits.weight * count;
  }
  if (p.maybe_grad_bias == nullptr) return nullptr;
  if (Status status = bias_partials<T>(c, grad_last, splits.bias, partials, stream)) return status;
  const ConvStrides stride{1, 0, {0, 0, 0}};
  return launch_flat(conv_sum_shares_kernel<T>, ceil_div(out_channels, kConvThreads), 0, stream,
                     partials, splits.bias, out_channels, static_cast<T*>(p.maybe_grad_bias),
                     stride, 1, 1, 1, 1);
}

}  // namespace

Status conv_backward_weight_cuda(const ConvBackwardWeightParams& params, Stream stream) {
  return visit_dtype(params.dtype,
                     [&](auto type) { return backward_weight<decltype(type)>(params, stream); });
}

}  // namespace fused
