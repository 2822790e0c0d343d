// The CPU launchers of attention: the kernels of attention_cpu.inl, for this machine's registers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention/attention.h"
#include "attention/attention_cpu_bf16.h"
#include "attention/attention_score.h"
#include "common/compensated_sum.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/scratch.h"

#if FUSED_X86
#include <immintrin.h>
#endif

#define FUSED_BFLOAT16_PAIRS 0
#define FUSED_CPU_KERNELS "attention/attention_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {

static bool multiplies_bfloat16(const AttentionProblem& problem) {
  return problem.dtype == DType::kBFloat16 && current_isa() == Isa::kAvx512Bf16;
}

Status attention_forward_cpu(const AttentionForwardParams& params) {
  if (multiplies_bfloat16(params)) return attention_forward_bf16(params);
  return FUSED_ISA_DISPATCH(attention_forward, params);
}

Status attention_tangent_cpu(const AttentionTangentParams& params) {
  if (multiplies_bfloat16(params)) return attention_tangent_bf16(params);
  return FUSED_ISA_DISPATCH(attention_tangent, params);
}

Status attention_backward_cpu(const AttentionBackwardParams& params) {
  if (multiplies_bfloat16(params)) return attention_backward_bf16(params);
  return FUSED_ISA_DISPATCH(attention_backward, params);
}

}  // namespace fused
