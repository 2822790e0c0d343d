// The CPU instruction sets that kernels are compiled for, and which of them to run.
#pragma once

#include "common/status.h"

#if defined(__x86_64__)
#define FUSED_X86 1
#else
#define FUSED_X86 0
#endif

namespace fused {

// Each has all that those before it have. Only kernels with products in bfloat16 are compiled for
// kAvx512Bf16; the others run their code for kAvx512.
enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The fastest set that this CPU has, or the one that FUSED_ISA=generic|avx2|avx512|avx512_bf16
// names where the CPU has that. Decided on the first call; throws std::invalid_argument where
// FUSED_ISA is none of them.
FUSED_API Isa current_isa();
FUSED_API const char* isa_name(Isa isa);

}  // namespace fused
