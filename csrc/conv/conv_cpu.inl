// The CPU kernels of one instruction set; see each file's head.
// clang-format off: each needs those above it
#include "conv/conv_cpu_activation.inl"
#include "conv/conv_cpu_tile.inl"
#include "conv/conv_cpu_activation_backward.inl"
#include "conv/conv_cpu_planar.inl"
#include "conv/conv_cpu_interleaved.inl"
#include "conv/conv_cpu_depthwise.inl"
#include "conv/conv_cpu_backward_weight_depthwise.inl"
#include "conv/conv_cpu_backward_weight.inl"
// clang-format on

// Channels in vectors where they lie side by side and fill a vector, else pixels.
template <typename T>
static void correlate(const Correlation& c) {
  const bool by_channel = c.dest_stride.channel == 1 && c.groups * int64_t{c.rows} > 1;
  if (by_channel && c.rows == 1 && c.depth == 1 && c.source_stride.channel == 1) {
    return correlate_depthwise<T>(c);
  }
  if (by_channel && c.rows >= std::min<int64_t>(8, kLanes<Accumulator<T>>)) {
    return correlate_interleaved<T>(c);
  }
  correlate_planar<T>(c);
}
