#include "attention/attention_cpu_bf16.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention/attention_score.h"
#include "common/compensated_sum.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/scratch.h"

#if FUSED_X86

#include <immintrin.h>

#define FUSED_CPU_KERNELS "attention/attention_cpu.inl"
#include "common/avx512_bf16.inl"

namespace fused {

Status attention_forward_bf16(const AttentionForwardParams& params) {
  return avx512_bf16::attention_forward(params);
}

Status attention_tangent_bf16(const AttentionTangentParams& params) {
  return avx512_bf16::attention_tangent(params);
}

Status attention_backward_bf16(const AttentionBackwardParams& params) {
  return avx512_bf16::attention_backward(params);
}

}  // namespace fused

#else

namespace fused {

constexpr Status kNever = "this CPU has no instruction for products in bfloat16";
Status attention_forward_bf16(const AttentionForwardParams&) { return kNever; }
Status attention_tangent_bf16(const AttentionTangentParams&) { return kNever; }
Status attention_backward_bf16(const AttentionBackwardParams&) { return kNever; }

}  // namespace fused

#endif
