// Every kernel compiled per instruction set, chosen per call. Included by one file for each type.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "conv/conv_cpu_kernels.h"
#include "conv/conv_cpu_plan.h"
#include "conv/conv_cpu_products.h"

#if FUSED_X86
#include <immintrin.h>
#endif

#define FUSED_CPU_KERNELS "conv/conv_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {

template <typename T>
void ConvCpu<T>::correlate(const Correlation& correlation) {
  FUSED_ISA_DISPATCH(correlate<T>, correlation);
}

template <typename T>
void ConvCpu<T>::backward_weight(const ConvBackwardWeightParams& params) {
  FUSED_ISA_DISPATCH(backward_weight<T>, params);
}

template <typename T>
void ConvCpu<T>::activation_backward(const ConvActivationBackwardParams& params) {
  FUSED_ISA_DISPATCH(activation_backward<T>, params);
}

}  // namespace fused
