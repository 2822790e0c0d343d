// The CPU launchers.
#include "common/dtype.h"
#include "conv/conv.h"
#include "conv/conv_cpu_kernels.h"
#include "conv/correlation.h"

namespace fused {

Status conv_forward_cpu(const ConvForwardParams& params) {
  visit_dtype(params.dtype,
              [&](auto type) { ConvCpu<decltype(type)>::correlate(forward_correlation(params)); });
  return nullptr;
}

Status conv_backward_input_cpu(const ConvBackwardInputParams& params) {
  return visit_dtype(params.dtype, [&](auto type) {
    return for_each_backward_input_correlation(params, [](const Correlation& c) -> Status {
      ConvCpu<decltype(type)>::correlate(c);
      return nullptr;
    });
  });
}

Status conv_backward_weight_cpu(const ConvBackwardWeightParams& params) {
  visit_dtype(params.dtype, [&](auto type) { ConvCpu<decltype(type)>::backward_weight(params); });
  return nullptr;
}

Status conv_activation_backward_cpu(const ConvActivationBackwardParams& params) {
  visit_dtype(params.dtype,
              [&](auto type) { ConvCpu<decltype(type)>::activation_backward(params); });
  return nullptr;
}

}  // namespace fused
