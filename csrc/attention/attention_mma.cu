// Which problems the tensor-core kernels take, and which of them runs one.
#include "attention/attention_mma.h"

namespace fused {
namespace {

// Elements of 16 bytes, and the widest instance, of a dtype that has any.
struct MmaLimits {
  int32_t pack, max_head_dim;
};

MmaLimits mma_limits(DType dtype) {
  if (dtype == DType::kFloat32) return {4, kMmaMaxHeadDim<float>};
  return {8, kMmaMaxHeadDim<Half>};
}

// Whether every row of a [batch, heads, rows, ..] tensor begins on 16 bytes, those behind the last
// one too, of which copies have the address and take nothing. The stride of one batch element or
// head is never used.
bool rows_aligned(const AttentionProblem& p, const void* data, const HeadStrides& strides,
                  int32_t heads) {
  const int32_t pack = mma_limits(p.dtype).pack;
  const auto misaligned = [&](int64_t stride) { return stride % pack != 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && !misaligned(strides.row) &&
         !(p.batch > 1 && misaligned(strides.batch)) && !(heads > 1 && misaligned(strides.head));
}

bool query_aligned(const AttentionProblem& p, const void* data, const HeadStrides& strides) {
  return rows_aligned(p, data, strides, p.num_heads);
}
bool key_aligned(const AttentionProblem& p, const void* data, const HeadStrides& strides) {
  return rows_aligned(p, data, strides, p.num_heads_kv);
}

bool has_mma_dtype(const AttentionProblem& p) {
  return p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 ||
         (p.dtype == DType::kFloat32 && p.allow_tf32);
}

// The part that the forward and the backward pass share.
bool supported(const AttentionProblem& p) {
  const MmaLimits limits = mma_limits(p.dtype);
  const auto fits = [&](int32_t dim) {
    return dim <= limits.max_head_dim && dim % limits.pack == 0;
  };
  return has_mma_dtype(p) && fits(p.head_dim) && fits(p.head_dim_v) &&
         p.maybe_block_table == nullptr && query_aligned(p, p.q, p.q_strides) &&
         key_aligned(p, p.k, p.k_strides) && key_aligned(p, p.v, p.v_strides) &&
         attention_mma_compiled();
}

}  // namespace

bool attention_mma_supported(const AttentionForwardParams& p) {
  return supported(p) && query_aligned(p, p.out, p.out_strides);
}

// Gradients that are not wanted are null, which is aligned.
bool attention_mma_supported(const AttentionBackwardParams& p) {
  return supported(p) && query_aligned(p, p.grad_out, p.grad_out_strides) &&
         query_aligned(p, p.maybe_grad_q, p.grad_q_strides) &&
         key_aligned(p, p.maybe_grad_k, p.grad_k_strides) &&
         key_aligned(p, p.maybe_grad_v, p.grad_v_strides);
}

Status attention_mma_forward(const AttentionForwardParams& p, Stream stream) {
  if (p.dtype == DType::kFloat32) return attention_mma_forward_float32(p, stream);
  return p.dtype == DType::kFloat16 ? attention_mma_forward_float16(p, stream)
                                    : attention_mma_forward_bfloat16(p, stream);
}

Status attention_mma_backward(const AttentionBackwardParams& p, Stream stream) {
  if (p.dtype == DType::kFloat32) return attention_mma_backward_float32(p, stream);
  return p.dtype == DType::kFloat16 ? attention_mma_backward_float16(p, stream)
                                    : attention_mma_backward_bfloat16(p, stream);
}

}  // namespace fused
