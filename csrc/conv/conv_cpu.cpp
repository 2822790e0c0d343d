// The CPU launchers: every kernel compiled per instruction set, chosen per call.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "conv/conv.h"
#include "conv/conv_cpu_plan.h"
#include "conv/correlation.h"

#define FUSED_CPU_KERNELS "conv/conv_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {

Status conv_forward_cpu(const ConvForwardParams& params) {
  visit_dtype(params.dtype, [&](auto type) {
    FUSED_ISA_DISPATCH(correlate<decltype(type)>, forward_correlation(params));
  });
  return nullptr;
}

Status conv_backward_input_cpu(const ConvBackwardInputParams& params) {
  return visit_dtype(params.dtype, [&](auto type) {
    return for_each_backward_input_correlation(params, [](const Correlation& c) -> Status {
      FUSED_ISA_DISPATCH(correlate<decltype(type)>, c);
      return nullptr;
    });
  });
}

Status conv_backward_weight_cpu(const ConvBackwardWeightParams& params) {
  visit_dtype(params.dtype,
              [&](auto type) { FUSED_ISA_DISPATCH(backward_weight<decltype(type)>, params); });
  return nullptr;
}

Status conv_activation_backward_cpu(const ConvActivationBackwardParams& params) {
  visit_dtype(params.dtype,
              [&](auto type) { FUSED_ISA_DISPATCH(activation_backward<decltype(type)>, params); });
  return nullptr;
}

}  // namespace fused
