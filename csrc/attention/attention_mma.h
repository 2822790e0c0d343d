// Attention on tensor cores (mma.sync, from sm_80 on), in float16 and bfloat16, and in float32
// where its products may be in tf32: which problems take it, and its launchers. Kernels for one
// architecture join here: a file of their own, a predicate beside these, the same params and the
// same tests.
#pragma once

#include "attention/attention_score.h"

namespace fused {

// The widest instance. Beyond 128 the tiles of floats have no room in the shared memory of sm_86,
// sm_89 and sm_120: the backward pass would need 144 KB of 99.
template <typename T>
constexpr int32_t kMmaMaxHeadDim = 256;
template <>
inline constexpr int32_t kMmaMaxHeadDim<float> = 128;

// Whether the tensor-core kernels run this problem on the current device: 16-bit elements or, with
// allow_tf32, float32; head dims of whole 16 bytes up to kMmaMaxHeadDim, every row of every
// tensor on 16 bytes, and code for sm_80 or later in this build. All else goes to the
// portable kernels; other head dims get here padded (attention_pad_multiple_cuda).
bool attention_mma_supported(const AttentionForwardParams& params);
bool attention_mma_supported(const AttentionBackwardParams& params);

Status attention_mma_forward(const AttentionForwardParams& params, Stream stream);
// grad_q, grad_k and grad_v, once delta is there.
Status attention_mma_backward(const AttentionBackwardParams& params, Stream stream);

// The same for one dtype each, in a file each, because they take long to compile.
Status attention_mma_forward_float16(const AttentionForwardParams& params, Stream stream);
Status attention_mma_forward_bfloat16(const AttentionForwardParams& params, Stream stream);
Status attention_mma_forward_float32(const AttentionForwardParams& params, Stream stream);
Status attention_mma_backward_float16(const AttentionBackwardParams& params, Stream stream);
Status attention_mma_backward_bfloat16(const AttentionBackwardParams& params, Stream stream);
Status attention_mma_backward_float32(const AttentionBackwardParams& params, Stream stream);

// Whether these kernels have code for the current device.
bool attention_mma_compiled();

// What the instances with options are for, beside pages. A scale that is not above 0, in float,
// leaves the scores in another order than their products.
inline bool has_options(const AttentionProblem& p) {
  return !has_no_score_options(p) || p.maybe_rng != nullptr || !(p.scale.in_float > 0);
}

// Calls `visitor(std::integral_constant<int, kDim>{})` for the instance that has room for both head
// dims of a problem that has an instance.
template <typename T, typename Visitor>
Status visit_mma_dim(const AttentionProblem& p, Visitor&& visitor) {
  const int32_t dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  if (dim <= 32) return visitor(std::integral_constant<int, 32>{});
  if (dim <= 64) return visitor(std::integral_constant<int, 64>{});
  if (dim <= 96) return visitor(std::integral_constant<int, 96>{});
  if constexpr (kMmaMaxHeadDim<T> > 128) {
    if (dim > 192) return visitor(std::integral_constant<int, 256>{});
    if (dim > 128) return visitor(std::integral_constant<int, 192>{});
  }
  return visitor(std::integral_constant<int, 128>{});
}

}  // namespace fused
