// The CPU kernels of one storage type. Each type is a translation unit of its own
// (conv_cpu_<type>.cpp, through conv_cpu_kernels.inl), so that many cores compile them.
#pragma once

#include "conv/conv.h"
#include "conv/correlation.h"

namespace fused {

template <typename T>
struct ConvCpu {
  static void correlate(const Correlation& correlation);
  static void backward_weight(const ConvBackwardWeightParams& params);
  static void activation_backward(const ConvActivationBackwardParams& params);
};

}  // namespace fused
