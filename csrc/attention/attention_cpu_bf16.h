// Attention in bfloat16 on CPUs that multiply it, for attention_cpu.cpp to choose: for
// Isa::kAvx512Bf16 only.
#pragma once

#include "attention/attention.h"

namespace fused {

Status attention_forward_bf16(const AttentionForwardParams& params);
Status attention_tangent_bf16(const AttentionTangentParams& params);
Status attention_backward_bf16(const AttentionBackwardParams& params);

}  // namespace fused
