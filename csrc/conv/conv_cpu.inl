// The CPU kernels of one instruction set; see each file's head.
// clang-format off: each needs those above it
#include "conv/conv_cpu_activation.inl"
#include "common/transpose.inl"
#include "conv/conv_cpu_tile.inl"
#include "conv/conv_cpu_activation_backward.inl"
#include "conv/conv_cpu_planar.inl"
#include "conv/conv_cpu_dense.inl"
#include "conv/conv_cpu_depthwise.inl"
#include "conv/conv_cpu_backward_weight_depthwise.inl"
#include "conv/conv_cpu_backward_weight.inl"
// clang-format on

// Output channels in vectors where they fill one, else pixels; input and output channels of a
// depthwise convolution in vectors where they lie side by side.
template <typename T>
static void correlate(const Correlation& c) {
  constexpr int64_t kVector = kLanes<Accumulator<T>>;
  const bool by_channel = c.dest_stride.channel == 1 && c.groups * int64_t{c.rows} > 1;
  if (by_channel && c.rows == 1 && c.depth == 1 && c.source_stride.channel == 1) {
    return correlate_depthwise<T>(c);
  }
  // Half a vector is better than what pixels cost where channels lie side by side.
  if (c.rows >= (by_channel ? std::min<int64_t>(8, kVector) : kVector))
    return correlate_dense<T>(c);
  correlate_planar<T>(c);
}
