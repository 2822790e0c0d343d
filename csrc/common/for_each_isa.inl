// Includes FUSED_CPU_KERNELS once per instruction set, each time inside a namespace of its own and
// a target region, so that no AVX-512 code can leak into a function that an older CPU runs.
// Whatever the kernels need must be included before this file: the region is for our code only.
// FUSED_ISA_DISPATCH(function, ...) then calls the current instruction set's function.
// FUSED_VECTOR_BYTES is the width of a vector register there.
//
// A file that defines FUSED_MULTIPLIES_BFLOAT16 as 1 before (and includes <immintrin.h> where
// FUSED_X86 is set) has its kernels compiled and run for avx512_bf16.inl's set too.
//
// No include guard: a file uses it once.

#define FUSED_VECTOR_BYTES 16
namespace fused {
namespace generic {
#include "common/block_gemm.inl"
#include "common/vector_math.inl"
#include FUSED_CPU_KERNELS
}  // namespace generic
}  // namespace fused
#undef FUSED_VECTOR_BYTES

#if FUSED_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FUSED_VECTOR_BYTES 32
namespace fused {
namespace avx2 {
#include "common/block_gemm.inl"
#include "common/vector_math.inl"
#include FUSED_CPU_KERNELS
}  // namespace avx2
}  // namespace fused
#undef FUSED_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define FUSED_VECTOR_BYTES 64
namespace fused {
namespace avx512 {
#include "common/block_gemm.inl"
#include "common/vector_math.inl"
#include FUSED_CPU_KERNELS
}  // namespace avx512
}  // namespace fused
#undef FUSED_VECTOR_BYTES
#pragma GCC pop_options

#if FUSED_MULTIPLIES_BFLOAT16
#include "common/avx512_bf16.inl"
#define FUSED_AVX512_DISPATCH(function, ...)                                                \
  (::fused::current_isa() == ::fused::Isa::kAvx512Bf16 ? avx512_bf16::function(__VA_ARGS__) \
                                                       : avx512::function(__VA_ARGS__))
#else
#define FUSED_AVX512_DISPATCH(function, ...) avx512::function(__VA_ARGS__)
#endif
#define FUSED_ISA_DISPATCH(function, ...)                                                         \
  (::fused::current_isa() >= ::fused::Isa::kAvx512 ? FUSED_AVX512_DISPATCH(function, __VA_ARGS__) \
   : ::fused::current_isa() == ::fused::Isa::kAvx2 ? avx2::function(__VA_ARGS__)                  \
                                                   : generic::function(__VA_ARGS__))
#else
#define FUSED_ISA_DISPATCH(function, ...) generic::function(__VA_ARGS__)
#endif
