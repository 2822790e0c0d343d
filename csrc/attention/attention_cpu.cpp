// The CPU launchers of attention: the kernels of attention_cpu.inl, for this machine's registers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention/attention.h"
#include "attention/attention_score.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"

#define FUSED_CPU_KERNELS "attention/attention_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {

Status attention_forward_cpu(const AttentionForwardParams& params) {
  return FUSED_ISA_DISPATCH(attention_forward, params);
}

Status attention_backward_cpu(const AttentionBackwardParams& params) {
  return FUSED_ISA_DISPATCH(attention_backward, params);
}

}  // namespace fused
