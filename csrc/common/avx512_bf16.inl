// Includes FUSED_CPU_KERNELS once more, for CPUs whose AVX-512 multiplies bfloat16: as
// for_each_isa.inl does it for the other instruction sets. FUSED_BFLOAT16_PAIRS tells the kernels
// that they have Pair to multiply. Only where FUSED_X86 is set.
//
// No include guard: a file uses it once.

#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define FUSED_VECTOR_BYTES 64
#define FUSED_BFLOAT16_PAIRS 1
namespace fused {
namespace avx512_bf16 {
#include "common/block_gemm.inl"
#include "common/vector_math.inl"
// clang-format off: needs those above it
#include "common/bfloat16_pairs.inl"
// clang-format on
#include FUSED_CPU_KERNELS
}  // namespace avx512_bf16
}  // namespace fused
#undef FUSED_BFLOAT16_PAIRS
#undef FUSED_VECTOR_BYTES
#pragma GCC pop_options
