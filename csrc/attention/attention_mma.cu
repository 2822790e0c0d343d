// Which problems the tensor-core kernels take, padded or as they are, and which of them runs one.
#include <algorithm>

#include "attention/attention_mma.h"
#include "attention/attention_split.h"

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
// head is never used; of pages there may be any number.
bool rows_aligned(const AttentionProblem& p, const void* data, const HeadStrides& strides,
                  int32_t batch, int32_t heads) {
  const int32_t pack = mma_limits(p.dtype).pack;
  const auto misaligned = [&](int64_t stride) { return stride % pack != 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && !misaligned(strides.row) &&
         !(batch > 1 && misaligned(strides.batch)) && !(heads > 1 && misaligned(strides.head));
}

bool query_aligned(const AttentionProblem& p, const void* data, const HeadStrides& strides) {
  return rows_aligned(p, data, strides, p.batch, p.num_heads);
}
bool key_aligned(const AttentionProblem& p, const void* data, const HeadStrides& strides) {
  const int32_t batch = p.maybe_block_table == nullptr ? p.batch : INT32_MAX;
  return rows_aligned(p, data, strides, batch, p.num_heads_kv);
}

bool has_mma_dtype(const AttentionProblem& p) {
  return p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 ||
         (p.dtype == DType::kFloat32 && p.allow_tf32);
}

// Whether there is an instance for such elements and head dims, wherever the rows lie.
bool has_instance(const AttentionProblem& p) {
  return has_mma_dtype(p) &&
         std::max(p.head_dim, p.head_dim_v) <= mma_limits(p.dtype).max_head_dim &&
         attention_mma_compiled();
}

bool has_whole_packs(const AttentionProblem& p) {
  const int32_t pack = mma_limits(p.dtype).pack;
  return p.head_dim % pack == 0 && p.head_dim_v % pack == 0;
}

// The part that the forward and the backward pass share.
bool supported(const AttentionProblem& p) {
  return has_instance(p) && has_whole_packs(p) && query_aligned(p, p.q, p.q_strides) &&
         key_aligned(p, p.k, p.k_strides) && key_aligned(p, p.v, p.v_strides);
}

int32_t pad_multiple(const AttentionProblem& p) {
  return !has_whole_packs(p) && has_instance(p) ? mma_limits(p.dtype).pack : 1;
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

// Few queries are split over the keys, which takes any head dim. Of packed sequences only their
// number of rows in all is known here.
int32_t attention_pad_multiple_cuda(const AttentionForwardParams& p, Stream) {
  return p.seqlen_q <= kFewQueries ? 1 : pad_multiple(p);
}
int32_t attention_pad_multiple_cuda(const AttentionBackwardParams& p, Stream) {
  return pad_multiple(p);
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
